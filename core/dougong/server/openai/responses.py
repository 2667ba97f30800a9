"""``/v1/responses``: OpenAI's Responses API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, JsonValue

from dougong.errors import InvalidRequestError
from dougong.server.chat.turn import ChatTurn
from dougong.server.openai.chat import trace_of
from dougong.server.openai.fields import StreamOptions, check_fields
from dougong.server.openai.response_items import as_items, read_items, read_response_choice, read_response_tools
from dougong.server.openai.response_store import ResponseStore, owner_of
from dougong.server.openai.response_stream import ResponseWriter
from dougong.server.streaming import EventStream, first_then, until_gone
from dougong.types import SamplingParams

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["ResponsesRequest", "router"]

_REFUSED = {
    "conversation": "use previous_response_id.",
    "prompt": "this server keeps no prompt templates; send instructions and input.",
    "moderation": "leave it out.",
}
_ACCEPTED = frozenset(
    {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier", "service_tier",
     "max_tool_calls", "include", "context_management"}
)  # fmt: skip


class ResponsesRequest(BaseModel):
    """What to answer, and how."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[dict[str, JsonValue]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, JsonValue] | None = None
    reasoning: dict[str, JsonValue] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: str | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    def turn(
        self, state: ServerState, name: str, items: list[dict[str, Any]], trace: Mapping[str, str] | None
    ) -> ChatTurn:
        """The turn to run over a conversation of ``items``.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        check_fields(self, state.config, _REFUSED, _ACCEPTED)
        if self.background:
            raise InvalidRequestError("background=true is not supported: stream the response, or wait for it.")
        if self.truncation not in (None, "disabled"):
            raise InvalidRequestError(f"truncation={self.truncation!r}: allowed is 'disabled'.")
        top = self.top_logprobs
        if top is not None and not 0 <= top <= state.config.max_logprobs:
            raise InvalidRequestError(f"top_logprobs={top}: allowed is 0 to {state.config.max_logprobs}.")
        if top is None and self.wants_scores:
            top = 0
        tools = read_response_tools(self.tools)
        choice, tools = read_response_choice(self.tool_choice, tools)
        own = {"temperature": self.temperature, "top_p": self.top_p}
        given = {key: value for key, value in own.items() if value is not None}
        options: dict[str, Any] = {**state.sampling_defaults, **given}
        kwargs: dict[str, Any] = {}
        effort = (self.reasoning or {}).get("effort")
        if effort is not None:
            kwargs["reasoning_effort"] = effort
            if effort == "none":
                kwargs["enable_thinking"] = False
        form = (self.text or {}).get("format")
        if form is not None and not isinstance(form, Mapping):
            raise InvalidRequestError("text.format: expected an object with a type.")
        return ChatTurn(
            messages=read_items(self.instructions, items),
            params=SamplingParams(**options, max_tokens=self.max_output_tokens, logprobs=top),
            request_id=name,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_format=form,
            template_kwargs=kwargs,
            trace=trace,
        )

    @property
    def wants_scores(self) -> bool:
        """Whether ``include`` asks for the log-probabilities of the text's tokens."""
        include = (self.model_extra or {}).get("include")
        return isinstance(include, list) and "message.output_text.logprobs" in include

    def head(self, name: str, model: str, turn: ChatTurn) -> dict[str, Any]:
        """The response object as it is before there is an answer."""
        text = {"format": {"type": "text"}} | (self.text or {})
        return {
            "id": name,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": turn.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": None, "summary": None} | (self.reasoning or {}),
            "store": self.store is not False,
            "temperature": turn.params.temperature,
            "text": text,
            "tool_choice": self.tool_choice or "auto",
            "tools": [{"strict": True, "description": None, "parameters": {}} | tool for tool in self.tools or ()],
            "top_logprobs": turn.params.logprobs or 0,
            "top_p": turn.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": self.user,
        }


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])
    store = ResponseStore()

    @routes.post("/v1/responses", responses=_RESPONSES)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer, going on from an earlier response if one is named."""
        owner = owner_of(request.headers)
        name = f"resp_{uuid.uuid4().hex}"
        model = state.check_model(body.model)
        before = [] if body.previous_response_id is None else store.get(owner, body.previous_response_id).conversation
        given = as_items(body.input)
        turn = body.turn(state, name, [*before, *given], trace_of(request))

        def keep(done: dict[str, Any]) -> None:
            if body.store is not False:
                store.put(owner, done, before, given)

        scored = turn.params.logprobs is not None
        tokenizer = state.client.tokenizer
        writer = ResponseWriter(body.head(name, model, turn), keep, tokenizer if scored else None)
        events = state.chat.run(turn)
        if not body.stream:
            return JSONResponse(await until_gone(request, writer.whole(events)))
        return EventStream(writer.stream(await until_gone(request, first_then(events))))

    @routes.get("/v1/responses/{name}", responses=_MISSING)
    async def retrieve_response(name: str, request: Request) -> JSONResponse:
        """A response that was stored."""
        return JSONResponse(store.get(owner_of(request.headers), name).body)

    @routes.delete("/v1/responses/{name}", responses=_MISSING)
    async def delete_response(name: str, request: Request) -> dict[str, Any]:
        """Forget a response."""
        store.delete(owner_of(request.headers), name)
        return {"id": name, "object": "response", "deleted": True}

    @routes.get("/v1/responses/{name}/input_items", responses=_MISSING)
    async def list_input_items(name: str, request: Request) -> JSONResponse:
        """What a stored response answers, the newest first."""
        found = store.get(owner_of(request.headers), name)
        items = [*found.before, *found.given][::-1]
        ids = [item["id"] for item in items]
        return JSONResponse(
            {"object": "list", "data": items, "first_id": ids[0], "last_id": ids[-1], "has_more": False}
        )

    return routes


_MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such response (any more)"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response; with stream=true as server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **_MISSING,
    429: {"description": "Too many requests; Retry-After says when to come back"},
}
