"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, JsonValue

from dougong.errors import InvalidRequestError
from dougong.server.chat.turn import (
    ChatTurn,
    Done,
    Event,
    Finished,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from dougong.server.errors import ApiError, as_api_error, openai_body
from dougong.server.openai.fields import GenerationFields, StreamOptions, check_fields
from dougong.server.openai.logprobs import chat_logprobs
from dougong.server.openai.messages import read_messages, read_tool_choice, read_tools
from dougong.server.streaming import DONE, EventStream, first_then, sse, until_gone

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["ChatRequest", "choice_failed", "router", "trace_of", "usage_body"]

_REFUSED = {
    "audio": "this server writes text only.",
    "functions": "use tools.",
    "function_call": "use tool_choice.",
    "prediction": "leave it out.",
    "web_search_options": "leave it out.",
    "moderation": "leave it out.",
}
#: OpenAI's fields without a meaning here: they change bookkeeping or billing, never the answer.
_ACCEPTED = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier",
     "service_tier", "store", "verbosity"}
)  # fmt: skip


class ChatRequest(GenerationFields):
    """A conversation, and how to go on with it."""

    messages: list[dict[str, JsonValue]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    """In place of ``max_tokens``, which OpenAI calls deprecated."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, JsonValue] | None = None
    reasoning_effort: str | None = None
    """Handed to the chat template as ``reasoning_effort``; ``none`` also as ``enable_thinking=false``."""
    modalities: list[str] | None = None

    chat_template: str | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Further variables of the chat template, such as ``enable_thinking``."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    include_reasoning: bool = True
    """False leaves the thinking in the text."""

    def turn(self, state: ServerState, request_id: str, trace: Mapping[str, str] | None = None) -> ChatTurn:
        """The turn to run.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        config = state.config
        check_fields(self, config, _REFUSED, _ACCEPTED)
        if self.modalities is not None and set(self.modalities) != {"text"}:
            raise InvalidRequestError(f"modalities={self.modalities}: allowed is ['text'].")
        if self.chat_template is not None and not config.trust_request_chat_template:
            raise InvalidRequestError(
                "chat_template: this server takes templates only from its own options "
                "(--trust-request-chat-template lets requests bring them)."
            )
        if self.continue_final_message and self.messages[-1].get("role") != "assistant":
            raise InvalidRequestError("continue_final_message: the last message must be the assistant's.")
        kwargs: dict[str, Any] = dict(self.chat_template_kwargs or {})
        for taken in _TEMPLATE_ARGUMENTS & set(kwargs):
            raise InvalidRequestError(f"chat_template_kwargs: {taken!r} is not the template's to take.")
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                kwargs.setdefault("enable_thinking", False)
        choice, tools = read_tool_choice(self.tool_choice, read_tools(self.tools))
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return ChatTurn(
            messages=read_messages(self.messages),
            params=self.params(config, state.sampling_defaults, max_tokens=limit, logprobs=self._scores(config)),
            request_id=request_id,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_format=self.response_format,
            reasoning=self.include_reasoning,
            template_kwargs=kwargs,
            chat_template=self.chat_template,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            priority=self.priority,
            cache_salt=self.cache_salt,
            kv_transfer_params=self.kv_transfer_params,
            trace=trace,
        )

    def _scores(self, config: Any) -> int | None:
        top = self.top_logprobs
        if top is None:
            return 0 if self.logprobs else None
        if not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true.")
        if not 0 <= top <= config.max_logprobs:
            raise InvalidRequestError(f"top_logprobs={top}: allowed is 0 to {config.max_logprobs}.")
        return top


_TEMPLATE_ARGUMENTS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages",
     "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
     "tools", "truncation", "max_length"}
)  # fmt: skip


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", tags=["OpenAI"], responses=_RESPONSES)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Go on with a conversation."""
        name = body.request_id or f"chatcmpl-{uuid.uuid4().hex}"
        model = state.check_model(body.model)
        turn = body.turn(state, name, trace_of(request))
        head = {"id": name, "created": int(time.time()), "model": model}
        top = turn.params.logprobs or 0
        events = state.chat.run(turn)
        if not body.stream:
            return JSONResponse(await until_gone(request, _whole(events, head, top, state.client.tokenizer)))
        ready = await until_gone(request, first_then(events))
        return EventStream(_chunks(ready, head, top, state.client.tokenizer, body.stream_options or StreamOptions()))

    return routes


def trace_of(request: Request) -> dict[str, str] | None:
    """The request's trace context (W3C)."""
    found = {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
    return found or None


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def choice_failed(event: Finished) -> ApiError | None:
    """The error that a failed choice makes of the whole answer."""
    if event.reason == "error":
        kind, _, text = (event.error or "").partition(": ")
        if kind == InvalidRequestError.__name__:  # what was asked for shows as impossible only in its midst
            return ApiError(400, text)
        return ApiError(500, event.error or "the engine failed")
    if event.reason == "abort":
        if event.error is not None:
            return ApiError(504, event.error)
        return ApiError(500, "the request was ended by the server", code="aborted")
    return None


class _Choice:
    """One choice of a whole answer, while it is put together."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.scores: list[Mapping[int, Any]] = []
        self.calls: dict[int, dict[str, Any]] = {}
        self.finish: Finished | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self.text.append(event.text)
            self.scores += event.logprobs or ()
        elif isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            call = self.calls.setdefault(
                event.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = event.id or call["id"]
            call["function"]["name"] = event.name or call["function"]["name"]
            call["function"]["arguments"] += event.arguments
        elif isinstance(event, Finished):
            self.finish = event

    def body(self, index: int, top: int, scored: bool, tokenizer: Any) -> dict[str, Any]:
        assert self.finish is not None
        text = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not self.calls else None,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = [self.calls[i] for i in sorted(self.calls)]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.scores, top, tokenizer) if scored else None,
            "finish_reason": self.finish.reason,
            "stop_reason": self.finish.stop_reason,
        }


async def _whole(events: AsyncGenerator[Event, None], head: dict[str, Any], top: int, tokenizer: Any) -> dict[str, Any]:
    choices: dict[int, _Choice] = {}
    done: Done | None = None
    scored = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                continue
            if isinstance(event, Done):
                done = event
                continue
            choices.setdefault(event.choice, _Choice()).take(event)
            scored = scored or (isinstance(event, TextDelta) and event.logprobs is not None)
            if isinstance(event, Finished):
                failure = choice_failed(event)
                if failure is not None:
                    raise failure
    assert done is not None
    body = {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [choices[i].body(i, top, scored, tokenizer) for i in sorted(choices)],
        "usage": usage_body(done.usage),
    }
    return body if done.kv_transfer_params is None else body | {"kv_transfer_params": done.kv_transfer_params}


async def _chunks(
    events: AsyncGenerator[Event, None], head: dict[str, Any], top: int, tokenizer: Any, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    """Chunks; a failure in mid-stream becomes an error event, after which the stream ends."""
    head = {"id": head["id"], "object": "chat.completion.chunk", "created": head["created"], "model": head["model"]}
    if options.include_usage:
        head["usage"] = None
    begun: set[int] = set()
    used: Callable[[], Usage] | None = None
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Started):
                    used = event.usage if options.continuous_usage_stats else None
                    continue
                if isinstance(event, Done):
                    if options.include_usage:
                        yield sse(head | {"choices": [], "usage": usage_body(event.usage)})
                    continue
                if used is not None:
                    head["usage"] = usage_body(used())
                if event.choice not in begun:
                    begun.add(event.choice)
                    yield sse(head | {"choices": [_choice(event.choice, {"role": "assistant", "content": ""})]})
                if isinstance(event, Finished):
                    failure = choice_failed(event)
                    if failure is not None:
                        yield sse(openai_body(failure))
                        break
                yield sse(head | {"choices": [_delta(event, top, tokenizer)]})
    except Exception as error:
        yield sse(openai_body(as_api_error(error)))
    yield DONE


def _delta(event: Event, top: int, tokenizer: Any) -> dict[str, Any]:
    if isinstance(event, TextDelta):
        logprobs = None if event.logprobs is None else chat_logprobs(event.logprobs, top, tokenizer)
        return _choice(event.choice, {"content": event.text}, logprobs)
    if isinstance(event, ReasoningDelta):
        return _choice(event.choice, {"reasoning_content": event.text})
    if isinstance(event, ToolCallDelta):
        call: dict[str, Any] = {"index": event.index, "function": {"arguments": event.arguments}}
        if event.id is not None:
            call |= {"id": event.id, "type": "function"}
            call["function"] = {"name": event.name, "arguments": event.arguments}
        return _choice(event.choice, {"tool_calls": [call]})
    assert isinstance(event, Finished)
    return _choice(event.choice, {}, None, event.reason) | {"stop_reason": event.stop_reason}


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true as server-sent events of chunks, ended by [DONE]",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    400: {"description": "The request is wrong; the error says what is allowed"},
    429: {"description": "Too many requests; Retry-After says when to come back"},
}
