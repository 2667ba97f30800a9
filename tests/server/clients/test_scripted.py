"""The real clients against the routes over a scripted chat: thinking, text, two calls, and the ways to end."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from anthropic.types import Message
from client_fields import check_fields
from fastapi import FastAPI
from openai.types.responses import Response

from dougong.server.anthropic import messages
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
from dougong.server.config import ServerConfig
from dougong.server.ollama import api
from dougong.server.openai import responses

CALLS: list[Event] = [
    ToolCallDelta(0, 0, "call_a", "weather", '{"city": '),
    ToolCallDelta(0, 0, arguments='"Rome"}'),
    ToolCallDelta(0, 1, "call_b", "now", "{}"),
]
ALL: list[Event] = [
    Started(12),
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "think."),
    TextDelta(0, "I look "),
    TextDelta(0, "it up."),
    *CALLS,
    Finished(0, "tool_calls"),
    Done(Usage(12, 9, cached_tokens=4, reasoning_tokens=3)),
]
STOPPED: list[Event] = [Started(3), TextDelta(0, "one "), Finished(0, "stop", "two"), Done(Usage(3, 2))]
CUT_OFF: list[Event] = [*ALL[:2], TextDelta(0, "hm"), Finished(0, "length"), Done(Usage(3, 2))]
BROKEN: list[Event] = [Started(3), TextDelta(0, "one "), Finished(0, "error", error="the device is gone")]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}


class ScriptedChat:
    """Answers every turn alike, and keeps the turns."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.turns: list[ChatTurn] = []
        self.dialect = SimpleNamespace(tools=None, reasoning=None)

    async def run(self, turn: ChatTurn) -> AsyncIterator[Event]:
        self.turns.append(turn)
        for event in self.events:
            await asyncio.sleep(0)
            yield event


def play(events: list[Event], work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> tuple[Any, ScriptedChat]:
    """Run ``work`` with an HTTP client of an application whose chat is scripted."""
    chat = ScriptedChat(events)
    config = ServerConfig(served_model_name=("m",))
    state: Any = SimpleNamespace(
        config=config, chat=chat, sampling_defaults={}, check_model=lambda name: name or "m",
        client=SimpleNamespace(tokenizer=None),
    )  # fmt: skip
    app = FastAPI()
    for module in (messages, responses, api):
        app.include_router(module.router(state))

    async def main() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await work(http)

    return asyncio.run(main()), chat


def claude(http: httpx.AsyncClient) -> anthropic.AsyncAnthropic:
    """The client over the same application, with the HTTP library that it is made for."""
    name = next(kind.__module__ for kind in anthropic.DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient")
    library = importlib.import_module(name.partition(".")[0])
    app: Any = http._transport
    own = library.AsyncClient(transport=library.ASGITransport(app.app, raise_app_exceptions=False))
    return anthropic.AsyncAnthropic(api_key="k", base_url="http://test", http_client=own, max_retries=0)


def gpt(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0)


ASK: Any = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}


def test_anthropic_whole_and_streamed_are_the_same() -> None:
    async def work(http: httpx.AsyncClient) -> Any:
        body = (await http.post("/v1/messages", json=ASK)).json()
        check_fields(body, Message)
        async with claude(http).messages.stream(**ASK) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        return await claude(http).messages.create(**ASK), final, kinds

    (whole, streamed, kinds), _ = play(ALL, work)
    for message in (whole, streamed):
        thinking, text, first, second = message.content
        assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Let me think.", "I look it up.")
        assert (first.type, first.id, first.name, first.input) == ("tool_use", "call_a", "weather", {"city": "Rome"})
        assert (second.name, second.input, message.stop_reason) == ("now", {}, "tool_use")
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (8, 4)
        assert message.usage.output_tokens == 9
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4


@pytest.mark.parametrize(
    ("events", "reason", "sequence"), [(STOPPED, "stop_sequence", "two"), (CUT_OFF, "max_tokens", None)]
)
def test_anthropic_says_why_it_ended(events: list[Event], reason: str, sequence: str | None) -> None:
    (message, _) = play(events, lambda http: claude(http).messages.create(**ASK))
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_anthropic_tells_of_a_failure_in_mid_stream() -> None:
    async def work(http: httpx.AsyncClient) -> None:
        async with claude(http).messages.stream(**ASK) as stream:
            async for _ in stream:
                pass

    with pytest.raises(anthropic.APIStatusError, match="the device is gone"):
        play(BROKEN, work)


def test_anthropic_conversations_become_turns() -> None:
    ask = ASK | {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "warm"}]},
                {"type": "text", "text": "and?"}]},
            {"role": "assistant", "content": "It is"},
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": WEATHER}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "stop_sequences": ["x"], "extra_body": {"temperature": 0.5, "top_k": 3},
        "thinking": {"type": "disabled"},
    }  # fmt: skip
    _, chat = play(STOPPED, lambda http: claude(http).messages.create(**ask))
    (turn,) = chat.turns
    assert [message["role"] for message in turn.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "user",
        "assistant",
    ]
    assert turn.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert turn.messages[2]["reasoning_content"] == "hm"
    assert turn.messages[3] == {"role": "tool", "tool_call_id": "a", "content": "warm"}
    assert turn.continue_final_message and turn.tool_choice == "required" and not turn.parallel_tool_calls
    assert turn.tools[0]["function"]["parameters"] == WEATHER and turn.template_kwargs == {"enable_thinking": False}
    assert (turn.params.stop, turn.params.temperature, turn.params.top_k) == (("x",), 0.5, 3)


def test_responses_whole_and_streamed_are_the_same() -> None:
    async def work(http: httpx.AsyncClient) -> Any:
        body = (await http.post("/v1/responses", json={"model": "m", "input": "Hi"})).json()
        check_fields(body, Response, frozenset({"store"}))  # which the API has and the type has not
        events = [event async for event in await gpt(http).responses.create(model="m", input="Hi", stream=True)]
        async with gpt(http).responses.stream(model="m", input="Hi") as stream:
            async for _ in stream:
                pass
            parsed = await stream.get_final_response()
        return Response.model_validate(body), events, parsed

    (whole, events, parsed), _ = play(ALL, work)
    for response in (whole, events[-1].response, parsed):
        thinking, text, first, second = response.output
        assert thinking.content[0].text == "Let me think." and response.output_text == "I look it up."
        assert (first.type, first.call_id, first.name) == ("function_call", "call_a", "weather")
        assert json.loads(first.arguments) == {"city": "Rome"} and second.arguments == "{}"
        assert response.status == "completed" and text.status == "completed"
        assert response.usage.output_tokens_details.reasoning_tokens == 3
        assert response.usage.input_tokens_details.cached_tokens == 4
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == [
        "response.created", "response.in_progress", "response.output_item.added"]  # fmt: skip
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == "I look it up."
    added = {event.item.id for event in events if event.type == "response.output_item.added"}
    assert added == {item.id for item in events[-1].response.output}


def test_responses_say_why_they_ended() -> None:
    (response, _) = play(CUT_OFF, lambda http: gpt(http).responses.create(model="m", input="Hi"))
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"

    async def work(http: httpx.AsyncClient) -> Any:
        return [event async for event in await gpt(http).responses.create(model="m", input="Hi", stream=True)]

    events, _ = play(BROKEN, work)
    assert events[-1].type == "response.failed" and events[-1].response.error.message == "the device is gone"


def test_responses_go_on_from_each_other() -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]

    async def work(http: httpx.AsyncClient) -> Any:
        client = gpt(http)
        first = await client.responses.create(model="m", input="Weather?", instructions="Be brief.", tools=tools)
        output: Any = [{"type": "function_call_output", "call_id": "call_a", "output": "warm"}]
        second = await client.responses.create(model="m", input=output, previous_response_id=first.id, tools=tools)
        items = await client.responses.input_items.list(second.id)
        kept = await client.responses.retrieve(first.id)
        await client.responses.delete(first.id)
        gone = await http.get(f"/v1/responses/{first.id}", headers={"authorization": "Bearer k"})
        other = await http.get(f"/v1/responses/{second.id}", headers={"authorization": "Bearer someone else's"})
        return first, second, items, kept, gone.status_code, other.status_code

    (first, second, items, kept, gone, other), chat = play(ALL, work)
    assert kept.output == first.output and second.previous_response_id == first.id
    assert [item.type for item in items.data][:1] == ["function_call_output"] and len(items.data) == 6
    assert gone != 200 and other != 200
    roles = [message["role"] for message in chat.turns[1].messages]
    assert roles == ["user", "assistant", "tool"], "instructions are the request's own"
    said = chat.turns[1].messages[1]
    assert said["content"] == "I look it up." and said["reasoning_content"] == "Let me think."
    assert [call["id"] for call in said["tool_calls"]] == ["call_a", "call_b"]
    assert said["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


def ollama_client(http: httpx.AsyncClient) -> ollama.AsyncClient:
    client = ollama.AsyncClient(host="http://test")
    client._client = http
    return client


def test_ollama_whole_and_streamed_are_the_same() -> None:
    ask: Any = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}

    async def work(http: httpx.AsyncClient) -> Any:
        client = ollama_client(http)
        whole = await client.chat(**ask)
        lines = [line async for line in await client.chat(**ask, stream=True)]
        generated = await client.generate(model="m", prompt="Hi")
        pieces = [line async for line in await client.generate(model="m", prompt="Hi", stream=True)]
        return whole, lines, generated, pieces

    (whole, lines, generated, pieces), _ = play(ALL, work)
    assert (whole.message.thinking, whole.message.content) == ("Let me think.", "I look it up.")
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert calls == [("weather", {"city": "Rome"}), ("now", {})]
    assert whole.done and whole.done_reason == "stop" and (whole.prompt_eval_count, whole.eval_count) == (12, 9)
    assert whole.total_duration >= whole.eval_duration >= 0
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert "".join(line.message.thinking or "" for line in lines) == whole.message.thinking
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert sum(len(line.message.tool_calls or ()) for line in lines) == 2
    assert generated.response == "".join(piece.response for piece in pieces) == "I look it up."


def test_ollama_tells_of_a_failure_in_mid_stream() -> None:
    async def work(http: httpx.AsyncClient) -> None:
        client = ollama_client(http)
        async for _ in await client.chat(model="m", messages=[{"role": "user", "content": "Hi"}], stream=True):
            pass

    with pytest.raises(ollama.ResponseError, match="the device is gone"):
        play(BROKEN, work)


def test_ollama_conversations_become_turns() -> None:
    ask: Any = {
        "model": "m",
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"function": {"name": "now", "arguments": {}}},
                {"function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
            {"role": "tool", "content": "warm", "tool_name": "weather"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER}}],
        "options": {"num_predict": 7, "temperature": 0.5, "stop": ["x"], "seed": 3, "repeat_penalty": 1.1,
                    "num_ctx": 9},
        "format": {"type": "object"}, "think": False,
    }  # fmt: skip
    _, chat = play(STOPPED, lambda http: ollama_client(http).chat(**ask))
    (turn,) = chat.turns
    assert turn.messages[2]["tool_call_id"] == turn.messages[1]["tool_calls"][1]["id"]
    params = turn.params
    assert (params.max_tokens, params.temperature, params.stop, params.seed) == (7, 0.5, ("x",), 3)
    assert params.repetition_penalty == 1.1 and params.structured is not None
    assert turn.template_kwargs == {"enable_thinking": False} and turn.tools[0]["function"]["name"] == "weather"
