"""``/api/chat`` and ``/api/generate``, as newline-delimited JSON; and what tells of the model."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, JsonValue

from dougong.errors import InvalidRequestError
from dougong.server.chat.blocks import Closed, Grown, in_blocks
from dougong.server.chat.turn import ChatTurn, Done, Event, Finished, Started
from dougong.server.errors import as_api_error, ollama_body
from dougong.server.ollama.conversation import read_format, read_options, read_turns
from dougong.server.ollama.embed import add_embed_routes
from dougong.server.ollama.models import Models
from dougong.server.ollama.raw import run_raw
from dougong.server.openai.chat import choice_failed, trace_of
from dougong.server.openai.fields import check_fields
from dougong.server.openai.logprobs import chat_logprobs
from dougong.server.openai.messages import read_tools
from dougong.server.streaming import EventStream, first_then, until_gone
from dougong.types import SamplingParams

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["router"]

_encode = msgspec.json.Encoder().encode
_ACCEPTED = frozenset({"keep_alive", "context", "truncate", "shift"})
_REFUSED = dict.fromkeys(("width", "height", "steps"), "this server writes text, no images.")
_NDJSON = "application/x-ndjson"


class Common(BaseModel):
    """What both ways to ask have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = None
    format: JsonValue = None
    options: dict[str, JsonValue] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    """As many of the likeliest tokens beside each chosen one; with ``logprobs`` only, as Ollama has it."""

    def params(self, state: ServerState) -> SamplingParams:
        """The sampling options.

        Raises:
            InvalidRequestError: one is unknown, or out of range.
        """
        check_fields(self, state.config, _REFUSED, _ACCEPTED)
        if self.think is not None and self.think not in (True, False, "low", "medium", "high", "max"):
            raise InvalidRequestError(f"think: {self.think!r}; allowed is true, false, 'low', 'medium' or 'high'.")
        most, top = state.config.max_logprobs, self.top_logprobs or 0
        if not 0 <= top <= most:
            raise InvalidRequestError(f"top_logprobs: {top}; allowed is 0 to {most}.")
        options = {**state.sampling_defaults, **read_options(self.options, state.config.max_stop)}
        scored = top if self.logprobs else None
        return SamplingParams(**options, structured=read_format(self.format), logprobs=scored)

    def template_kwargs(self) -> dict[str, Any]:
        if self.think is None:
            return {}
        kwargs: dict[str, Any] = {"enable_thinking": self.think is not False}
        return kwargs | ({"reasoning_effort": self.think} if isinstance(self.think, str) else {})


class ChatRequest(Common):
    """A conversation, and how to go on with it."""

    messages: list[dict[str, JsonValue]] | None = None
    tools: list[dict[str, JsonValue]] | None = None


class GenerateRequest(Common):
    """A prompt, and how to answer it."""

    prompt: str | None = None
    suffix: str | None = None
    images: list[JsonValue] | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None


@dataclass
class Clock:
    """Nanoseconds of a request's parts."""

    began: int = field(default_factory=time.perf_counter_ns)
    first: int = 0

    def fields(self, prompt_tokens: int, tokens: int) -> dict[str, int]:
        """As Ollama names them."""
        now = time.perf_counter_ns()
        first = self.first or now
        return {
            "total_duration": now - self.began,
            "load_duration": 0,
            "prompt_eval_count": prompt_tokens,
            "prompt_eval_duration": first - self.began,
            "eval_count": tokens,
            "eval_duration": now - first,
        }


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Ollama"])
    models = Models(state)

    @routes.post("/api/chat", responses=_RESPONSES)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Go on with a conversation."""
        name = models.check(body.model)
        params = body.params(state)
        if not body.messages:
            return JSONResponse(_loaded(name) | {"message": {"role": "assistant", "content": ""}})
        turn = ChatTurn(
            messages=read_turns(body.messages),
            params=params,
            request_id=f"ollama-{uuid.uuid4().hex}",
            tools=read_tools(body.tools),
            template_kwargs=body.template_kwargs(),
            trace=trace_of(request),
        )
        lines = _lines(state.chat.run(turn), name, _scores_of(state, params), chat=True)
        return await _answer(request, lines, body.stream is not False, chat=True)

    @routes.post("/api/generate", responses=_RESPONSES)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Answer a prompt: as a conversation of one message or, with ``raw``, as it stands."""
        name = models.check(body.model)
        params = body.params(state)
        for field_name in ("suffix", "template", "images"):
            if getattr(body, field_name):
                raise InvalidRequestError(f"{field_name}: this server does not support it. Leave it out.")
        if not body.prompt:
            return JSONResponse(_loaded(name) | {"response": ""})
        request_id = f"ollama-{uuid.uuid4().hex}"
        if body.raw:
            events = run_raw(state, body.prompt, params, request_id, trace_of(request))
        else:
            system = [{"role": "system", "content": body.system}] if body.system else []
            events = state.chat.run(
                ChatTurn(
                    messages=[*system, {"role": "user", "content": body.prompt}],
                    params=params,
                    request_id=request_id,
                    template_kwargs=body.template_kwargs(),
                    trace=trace_of(request),
                )
            )
        lines = _lines(events, name, _scores_of(state, params), chat=False)
        return await _answer(request, lines, body.stream is not False, chat=False)

    models.add_routes(routes)
    add_embed_routes(routes, state, models)
    return routes


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _loaded(name: str) -> dict[str, Any]:
    """The answer to a question without a prompt, which asks Ollama to load the model."""
    return {"model": name, "created_at": _now(), "done": True, "done_reason": "load"}


def _scores_of(state: ServerState, params: SamplingParams) -> Callable[[list[Any]], list[Any]] | None:
    """What makes Ollama's log-probabilities of the engine's; None where they were not asked for."""
    top = params.logprobs
    if top is None:
        return None
    return lambda entries: list(chat_logprobs(entries, top, state.client.tokenizer)["content"])


async def _answer(
    request: Request, lines: AsyncGenerator[dict[str, Any], None], stream: bool, *, chat: bool
) -> Response:
    if stream:
        ready = await until_gone(request, first_then(lines))
        return EventStream(_encoded(ready), _NDJSON)
    return JSONResponse(await until_gone(request, _whole(lines, chat=chat)))


async def _lines(
    events: AsyncGenerator[Event, None],
    name: str,
    scores_of: Callable[[list[Any]], list[Any]] | None,
    *,
    chat: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer's objects; the last one has ``done``."""
    clock = Clock()
    end: Finished | None = None
    prompt_tokens = 0
    scores: list[Any] = []

    def scored() -> dict[str, Any]:
        """The log-probabilities that no line has told yet."""
        if scores_of is None or not scores:
            return {}
        told = scores_of(scores)
        scores.clear()
        return {"logprobs": told}

    def line(**fields: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"content": "", **fields}
        if chat:
            return {"model": name, "created_at": _now(), "message": {"role": "assistant", **message}, "done": False}
        text = message.pop("content")
        return {"model": name, "created_at": _now(), "response": text, **message, "done": False}

    async with aclosing(in_blocks(events)) as parts:
        async for event in parts:
            if not clock.first and not isinstance(event, Started):
                clock.first = time.perf_counter_ns()
            if isinstance(event, Started):
                prompt_tokens = event.prompt_tokens
            elif isinstance(event, Grown) and event.block.kind != "call":
                scores += event.logprobs
                if event.text:
                    yield line(**{"thinking" if event.block.kind == "reasoning" else "content": event.text}) | scored()
            elif isinstance(event, Closed) and event.block.kind == "call":
                block = event.block
                function = {"name": block.name, "arguments": block.arguments()}
                yield line(tool_calls=[{"id": block.call_id, "function": function}])
            elif isinstance(event, Finished):
                failure = choice_failed(event)
                if failure is not None:
                    raise failure
                end = event
            elif isinstance(event, Done):
                assert end is not None
                reason = "length" if end.reason == "length" else "stop"
                times = clock.fields(prompt_tokens, event.usage.completion_tokens)
                yield line() | scored() | {"done": True, "done_reason": reason} | times


async def _encoded(lines: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """A failure in mid-stream becomes a last line with ``error``."""
    try:
        async with aclosing(lines):
            async for one in lines:
                yield _encode(one) + b"\n"
    except Exception as error:
        yield _encode(ollama_body(as_api_error(error))) + b"\n"


async def _whole(lines: AsyncGenerator[dict[str, Any], None], *, chat: bool) -> dict[str, Any]:
    texts: dict[str, list[str]] = {"content": [], "thinking": []}
    calls: list[Any] = []
    scores: list[Any] = []
    last: dict[str, Any] = {}
    async with aclosing(lines):
        async for last in lines:
            part: Mapping[str, Any] = last["message"] if chat else {**last, "content": last["response"]}
            for kind, found in texts.items():
                found.append(part.get(kind) or "")
            calls += part.get("tool_calls") or ()
            scores += last.get("logprobs") or ()
    message: dict[str, Any] = {"content": "".join(texts["content"])}
    if any(texts["thinking"]):
        message["thinking"] = "".join(texts["thinking"])
    if calls:
        message["tool_calls"] = calls
    if scores:
        last["logprobs"] = scores
    if chat:
        return last | {"message": {"role": "assistant", **message}}
    return last | {"response": message.pop("content"), **message}


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: objects, one a line, the last with done=true; one object with stream=false",
        "content": {_NDJSON: {}, "application/json": {}},
    },
    404: {"description": "There is no such model here"},
    429: {"description": "Too many requests; Retry-After says when to come back"},
}
