"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from dougong.errors import InvalidRequestError
from dougong.server.anthropic.conversation import read_conversation, read_tool_choice, read_tools
from dougong.server.chat.blocks import Block, Closed, Grown, Opened, in_blocks
from dougong.server.chat.turn import ChatTurn, Done, Event, Finished, Started, Usage
from dougong.server.errors import anthropic_body, as_api_error
from dougong.server.openai.chat import choice_failed, trace_of
from dougong.server.openai.fields import check_fields
from dougong.server.streaming import EventStream, first_then, sse, until_gone
from dougong.types import SamplingParams

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["MessagesRequest", "router"]

_REFUSED = {
    "mcp_servers": "this server calls no other servers.",
    "container": "this server runs no code.",
}
#: Bookkeeping, billing and caching at Anthropic's: they change no answer here.
_ACCEPTED = frozenset(
    {"metadata", "service_tier", "cache_control", "inference_geo", "context_management", "speed", "diagnostics",
     "user_profile_id", "workspace_id"}
)  # fmt: skip
_LONGEST_STOP = 1000


class CountRequest(BaseModel):
    """A conversation, as far as its tokens are concerned."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, JsonValue]] = Field(min_length=1)
    system: str | list[dict[str, JsonValue]] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: dict[str, JsonValue] | None = None
    thinking: dict[str, JsonValue] | None = None
    output_format: dict[str, JsonValue] | None = None
    output_config: dict[str, JsonValue] | None = None

    def turn(
        self, state: ServerState, request_id: str, params: SamplingParams, trace: Mapping[str, str] | None = None
    ) -> ChatTurn:
        """The turn to run.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        check_fields(self, state.config, _REFUSED, _ACCEPTED)
        tools = read_tools(self.tools)
        choice, parallel = read_tool_choice(self.tool_choice, tools)
        messages = read_conversation(self.system, self.messages)
        # An assistant's message at the end is the beginning of the answer.
        goes_on = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        config: Mapping[str, Any] = self.output_config or {}
        return ChatTurn(
            messages=messages,
            params=params,
            request_id=request_id,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            response_format=self.output_format or config.get("format"),
            template_kwargs=self._template_kwargs(),
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            trace=trace,
        )

    def _template_kwargs(self) -> dict[str, Any]:
        kind = None if self.thinking is None else self.thinking.get("type")
        if kind not in (None, "enabled", "disabled", "adaptive"):
            raise InvalidRequestError(f"thinking.type: {kind!r}; allowed is enabled, adaptive or disabled.")
        found: dict[str, Any] = {}
        if kind in ("enabled", "disabled"):
            found["enable_thinking"] = kind == "enabled"
        effort = (self.output_config or {}).get("effort")
        if effort is not None:
            found["reasoning_effort"] = effort
        return found


class MessagesRequest(CountRequest):
    """A conversation, and how to go on with it."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def params(self, state: ServerState) -> SamplingParams:
        """The sampling options.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        stop = self.stop_sequences or []
        if len(stop) > state.config.max_stop:
            raise InvalidRequestError(f"stop_sequences: {len(stop)}; at most {state.config.max_stop} are allowed.")
        if any(len(text) > _LONGEST_STOP for text in stop):
            raise InvalidRequestError(f"stop_sequences: one has more than {_LONGEST_STOP} characters.")
        if self.temperature is not None and not 0 <= self.temperature <= 1:
            raise InvalidRequestError(f"temperature: {self.temperature}; allowed is 0 to 1.")
        own = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {name: value for name, value in own.items() if value is not None}
        options: dict[str, Any] = {**state.sampling_defaults, **given}
        return SamplingParams(**options, max_tokens=self.max_tokens, stop=tuple(text for text in stop if text))


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Anthropic"])

    @routes.post("/v1/messages", responses=_RESPONSES)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Go on with a conversation."""
        name = f"msg_{uuid.uuid4().hex}"
        model = state.check_model(body.model)
        events = state.chat.run(body.turn(state, name, body.params(state), trace_of(request)))
        if not body.stream:
            return JSONResponse(await until_gone(request, _whole(events, name, model)))
        return EventStream(_stream(await until_gone(request, first_then(events)), name, model))

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        """How many tokens a conversation would have as a prompt, tools and system prompt included."""
        state.check_model(body.model)
        _, ids = await state.chat.render(body.turn(state, "count", SamplingParams()))
        return {"input_tokens": len(ids)}

    return routes


def _message(name: str, model: str, content: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts cached tokens apart from the input's others."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _end(event: Finished) -> dict[str, Any]:
    if event.reason == "stop" and isinstance(event.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": event.stop_reason}
    words = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": words[event.reason], "stop_sequence": None}


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": block.arguments()}
    return {"type": "text", "text": block.text}


async def _whole(events: AsyncGenerator[Event, None], name: str, model: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    end: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    async with aclosing(in_blocks(events)) as parts:
        async for event in parts:
            if isinstance(event, Closed):
                content.append(_content(event.block))
            elif isinstance(event, Finished):
                failure = choice_failed(event)
                if failure is not None:
                    raise failure
                end = _end(event)
            elif isinstance(event, Done):
                usage = _usage(event.usage)
    return _message(name, model, content, usage) | end


async def _stream(events: AsyncGenerator[Event, None], name: str, model: str) -> AsyncGenerator[bytes, None]:
    """Anthropic's events; a failure in mid-stream becomes an ``error`` event, after which the stream ends."""
    end: dict[str, Any] = {}
    try:
        async with aclosing(in_blocks(events)) as parts:
            async for event in parts:
                if isinstance(event, Finished):
                    failure = choice_failed(event)
                    if failure is not None:
                        yield sse(anthropic_body(failure), "error")
                        return
                    end = _end(event)
                elif isinstance(event, Started):
                    usage = _usage(Usage(event.prompt_tokens, 0, event.cached_tokens))
                    yield _event("message_start", message=_message(name, model, [], usage))
                    yield _event("ping")
                elif isinstance(event, Done):
                    yield _event("message_delta", delta=end, usage=_usage(event.usage))
                    yield _event("message_stop")
                else:
                    for chunk in _block_events(event):
                        yield chunk
    except Exception as error:
        yield sse(anthropic_body(as_api_error(error)), "error")


def _block_events(event: Opened | Grown | Closed) -> list[bytes]:
    place = event.block.place
    if isinstance(event, Opened):
        empty = _content(event.block)
        return [_event("content_block_start", index=place, content_block=empty)]
    if isinstance(event, Grown):
        return [_event("content_block_delta", index=place, delta=_delta(event))] if event.text else []
    out = [_event("content_block_stop", index=place)]
    if event.block.kind == "reasoning":
        signature = {"type": "signature_delta", "signature": ""}
        out.insert(0, _event("content_block_delta", index=place, delta=signature))
    return out


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _delta(event: Grown) -> dict[str, Any]:
    if event.block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": event.text}
    if event.block.kind == "call":
        return {"type": "input_json_delta", "partial_json": event.text}
    return {"type": "text_delta", "text": event.text}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The message; with stream=true as server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    404: {"description": "There is no such model here"},
    429: {"description": "Too many requests; Retry-After says when to come back"},
}
