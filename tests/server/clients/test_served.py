"""The real clients against a served random model: what they ask for is kept to, whatever the model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import ollama
import openai
import pytest
from client_fields import check_fields
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from server_harness import Served

pytestmark = pytest.mark.xdist_group("clients")

HELLO: Any = [{"role": "user", "content": "Hello"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bern"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Place(BaseModel):
    city: Literal["Rome", "Bern"]
    warm: bool


@pytest.fixture(scope="module")
def gpt(roomy: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def claude(roomy: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=roomy.url, api_key="none", max_retries=0, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def llama(roomy: Served) -> Iterator[ollama.Client]:
    one = ollama.Client(host=roomy.url, timeout=60)
    yield one
    one._client.close()


TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


ALLOWED: Any = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "weather"}},
        {"type": "allowed_tools", "allowed_tools": ALLOWED},
    ],
    ids=["required", "named", "allowed"],
)
def test_chat_tools_that_must_be_called_are(gpt: openai.OpenAI, choice: Any) -> None:
    ask: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "temperature": 0,
                "max_tokens": 400, "parallel_tool_calls": False}  # fmt: skip
    whole = gpt.chat.completions.create(**ask)
    check_fields(whole.model_dump(exclude_unset=True), ChatCompletion, frozenset({"stop_reason"}))
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content is None
    if call.function.name == "weather":
        jsonschema.validate(json.loads(call.function.arguments), PLACE)
    assert choice == "required" or call.function.name == "weather"
    chunks = list(gpt.chat.completions.create(**ask, stream=True))
    deltas = [one for chunk in chunks for choice in chunk.choices for one in choice.delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == call.function.name
    assert "".join(one.function.arguments for one in deltas) == call.function.arguments
    assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_chat_answers_keep_to_a_schema(gpt: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    several = gpt.chat.completions.create(
        model="tiny", messages=HELLO, response_format=form, n=3, temperature=1, seed=1, max_tokens=200
    )
    for choice in several.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PLACE)
    parsed = gpt.chat.completions.parse(model="tiny", messages=HELLO, response_format=Place, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Place)
    inside: Any = {"type": "json_object", "schema": PLACE}  # as llama.cpp and others have it
    other = gpt.chat.completions.create(model="tiny", messages=HELLO, response_format=inside, max_tokens=200)
    jsonschema.validate(json.loads(other.choices[0].message.content or ""), PLACE)
    bounded = gpt.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=5
    )
    assert (bounded.choices[0].message.content or "").lstrip().startswith("{")


BAD_SCHEMAS: dict[str, Any] = {
    "unknown type": {"type": "strin"},
    "states": {"allOf": [{"multipleOf": 7919}, {"multipleOf": 104729}]},
    "remote": {"$ref": "http://example.com/"},
    "deep": json.loads('{"items":' * 70 + "{}" + "}" * 70),
}


@pytest.mark.parametrize("name", ["unknown format", *BAD_SCHEMAS])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_schemas_are_refused(roomy: Served, gpt: openai.OpenAI, name: str, stream: bool) -> None:
    form: Any = {"type": "xml"}
    if name in BAD_SCHEMAS:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD_SCHEMAS[name]}}
    with pytest.raises(openai.BadRequestError):
        gpt.chat.completions.create(model="tiny", messages=HELLO, response_format=form, stream=stream)
    roomy.wait_idle()


def test_responses(gpt: openai.OpenAI) -> None:
    parsed = gpt.responses.parse(model="tiny", input="Where?", text_format=Place, max_output_tokens=300)
    assert isinstance(parsed.output_parsed, Place)
    tools: Any = [{"type": "function", "name": "weather", "parameters": PLACE, "strict": True}]
    first = gpt.responses.create(
        model="tiny", input="Weather?", tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    (call,) = first.output
    assert call.type == "function_call" and first.status == "completed"
    jsonschema.validate(json.loads(call.arguments), PLACE)
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "warm"}]
    with gpt.responses.stream(
        model="tiny", previous_response_id=first.id, input=result, tools=tools, max_output_tokens=8, temperature=0
    ) as stream:
        *_, last = stream
    assert last.type in ("response.completed", "response.incomplete")
    final = last.response
    assert final.usage is not None and first.usage is not None
    assert final.usage.input_tokens > first.usage.input_tokens
    scored = gpt.responses.create(model="tiny", input="Hi", max_output_tokens=4, top_logprobs=2, temperature=0)
    assert len(scored.output[0].content[0].logprobs) == 4  # type: ignore[union-attr]
    for wrong in (
        {"previous_response_id": "resp_none"}, {"background": True}, {"tools": [{"type": "web_search"}]},
        {"input": [{"type": "item_reference", "id": "x"}]}, {"input": []}, {"truncation": "auto"},
    ):  # fmt: skip
        with pytest.raises(openai.APIStatusError) as caught:
            gpt.responses.create(**{"model": "tiny", "input": "Hi", **wrong})
        assert caught.value.status_code in (400, 404)


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    greedy = {"temperature": 0}  # which the client's own types no longer have
    ask: Any = {"model": "tiny", "max_tokens": 12, "messages": HELLO, "extra_body": greedy}
    whole = claude.messages.create(**ask)
    assert whole.stop_reason in ("max_tokens", "end_turn")
    with claude.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text  # type: ignore[union-attr]
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model="tiny", messages=HELLO)
    cached = whole.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == whole.usage.input_tokens + cached
    middle = text[2:4]
    stopped = claude.messages.create(**ask, stop_sequences=[middle])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == middle


def test_anthropic_tools_and_formats(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "weather", "description": "of a city", "input_schema": PLACE}]
    ask: Any = {"model": "tiny", "max_tokens": 300, "messages": HELLO, "tools": tools}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        with claude.messages.stream(**ask, tool_choice=choice) as stream:
            final = stream.get_final_message()
        (call,) = final.content
        assert call.type == "tool_use" and final.stop_reason == "tool_use"
        jsonschema.validate(call.input, PLACE)
    answer: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "warm"}
    said: Any = {"role": "assistant", "content": final.content}
    result: Any = [*HELLO, said, {"role": "user", "content": [answer]}]
    assert claude.messages.create(**(ask | {"messages": result, "max_tokens": 3})).usage.output_tokens == 3
    form = {"format": {"type": "json_schema", "schema": PLACE}}
    kept = claude.messages.create(model="tiny", max_tokens=300, messages=HELLO, extra_body={"output_config": form})
    jsonschema.validate(json.loads(kept.content[0].text), PLACE)  # type: ignore[union-attr]


def test_anthropic_errors(claude: anthropic.Anthropic, roomy: Served) -> None:
    ask: Any = {"model": "tiny", "max_tokens": 5, "messages": HELLO}
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**(ask | {"model": "claude"}))
    image = {"type": "image", "source": {"type": "url", "url": "http://example.com/x.png"}}
    for wrong in (
        {"max_tokens": 0}, {"extra_body": {"temperature": 7}}, {"messages": [{"role": "user", "content": [image]}]},
        {"tool_choice": {"type": "any"}}, {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        {"thinking": {"type": "sometimes"}}, {"messages": [{"role": "robot", "content": "x"}]},
    ):  # fmt: skip
        with pytest.raises(anthropic.BadRequestError) as caught:
            claude.messages.create(**(ask | wrong))
        assert caught.value.body["type"] == "error"  # type: ignore[index,call-overload]
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index,call-overload]
    assert httpx.post(f"{roomy.url}/v1/messages", json={"model": "tiny", "messages": HELLO}).status_code == 400


def test_ollama(llama: ollama.Client, roomy: Served) -> None:
    ask: Any = {"model": "tiny", "messages": HELLO, "options": {"temperature": 0, "num_predict": 8}}
    whole = llama.chat(**ask)
    lines = list(llama.chat(**ask, stream=True))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert whole.eval_count == lines[-1].eval_count and whole.done_reason in ("length", "stop")
    assert llama.generate(model="tiny:latest", prompt="Hello", options=ask["options"]).response == whole.message.content
    raw = llama.generate(model="tiny", prompt="Hello", raw=True, options={"num_predict": 3})
    assert raw.prompt_eval_count == len("Hello") and raw.eval_count == 3
    kept = llama.chat(model="tiny", messages=HELLO, format=PLACE, options={"num_predict": 300})
    jsonschema.validate(json.loads(kept.message.content or ""), PLACE)
    tools = llama.chat(**ask, tools=[TOOLS[0]])
    assert tools.prompt_eval_count > whole.prompt_eval_count
    assert llama.generate(model="tiny", prompt="").done_reason == "load"


def test_ollama_log_probabilities(llama: ollama.Client) -> None:
    ask: Any = {"model": "tiny", "messages": HELLO, "options": {"temperature": 0, "num_predict": 6}}
    scored = llama.chat(**ask, logprobs=True, top_logprobs=2)
    assert scored.eval_count == len(scored.logprobs) and all(len(one.top_logprobs) == 2 for one in scored.logprobs)
    assert all(one.logprob <= 0 and one.top_logprobs[0].logprob == one.logprob for one in scored.logprobs)
    lines = list(llama.chat(**ask, logprobs=True, stream=True))
    streamed = [one for line in lines for one in line.logprobs or ()]
    assert [one.logprob for one in streamed] == [one.logprob for one in scored.logprobs]
    raw = llama.generate(model="tiny", prompt="Hello", raw=True, logprobs=True, options={"num_predict": 3})
    assert len(raw.logprobs) == raw.eval_count
    assert llama.chat(**ask).logprobs is None


def test_ollama_embeddings(llama: ollama.Client, gpt: openai.OpenAI) -> None:
    wanted = [one.embedding for one in gpt.embeddings.create(model="tiny", input=["ab", "a longer text"]).data]
    found = llama.embed(model="tiny:latest", input=["ab", "a longer text"])
    assert found.model == "tiny:latest" and found.prompt_eval_count == len("ab") + len("a longer text")
    for one, other in zip(found.embeddings, wanted, strict=True):
        assert list(one) == pytest.approx(other, abs=1e-6)
    assert list(llama.embeddings(model="tiny", prompt="ab").embedding) == pytest.approx(wanted[0], abs=1e-6)
    assert len(llama.embed(model="tiny", input="ab", dimensions=8).embeddings[0]) == 8
    assert llama.embed(model="tiny", input=[]).embeddings == []
    long = "x" * 3000  # the context holds 2,048
    assert llama.embed(model="tiny", input=long).prompt_eval_count == 2047
    with pytest.raises(ollama.ResponseError, match="3000 tokens"):
        llama.embed(model="tiny", input=long, truncate=False)
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        llama.embed(model="other", input="ab")


def test_ollama_describes_the_model(llama: ollama.Client, roomy: Served) -> None:
    assert [model.model for model in llama.list().models] == ["tiny", "alias"]
    assert llama.list().models[0].details.family == "llama" and llama.list().models[0].size > 0
    shown = llama.show("alias")
    assert shown.modelinfo["llama.context_length"] == roomy.client.info.max_model_len
    assert "completion" in shown.capabilities and "tools" in shown.capabilities
    assert [model.model for model in llama.ps().models] == ["tiny", "alias"]
    assert httpx.get(f"{roomy.url}/api/version").json()["version"]


def test_ollama_errors(llama: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        llama.chat(model="other", messages=HELLO)
    assert caught.value.status_code == 404
    for wrong in ({"options": {"mirostat": 2}}, {"options": {"temprature": 1}}, {"options": {"temperature": -1}},
                  {"format": "yaml"}, {"messages": [{"role": "robot", "content": ""}]}):  # fmt: skip
        with pytest.raises((ollama.ResponseError, ValueError)) as caught:
            llama.chat(**{"model": "tiny", "messages": HELLO, **wrong})
        assert getattr(caught.value, "status_code", 400) == 400


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/api/chat", "/api/generate"])
def test_a_client_that_goes_away_ends_its_request(roomy: Served, path: str) -> None:
    ask: Any = {"model": "tiny", "stream": True}
    if path == "/v1/responses":
        ask |= {"input": "Hi", "max_output_tokens": 1500}
    elif path == "/api/generate":
        ask |= {"prompt": "Hi"}
    else:
        ask |= {"messages": HELLO} | ({"max_tokens": 1500} if path == "/v1/messages" else {})
    with httpx.stream("POST", roomy.url + path, json=ask, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
    roomy.wait_idle(10)


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/api/chat", "/api/generate"]
)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 5}', b'{"model": "tiny", "messages": 7}', b"\xff\xfe"])
def test_broken_bodies_are_answered_in_the_apis_own_words(roomy: Served, path: str, body: bytes) -> None:
    answer = httpx.post(roomy.url + path, content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert isinstance(error, str) if path.startswith("/api/") else error["message"]
    assert not path.startswith("/v1/messages") or answer.json()["type"] == "error"
