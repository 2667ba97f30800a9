"""Every client against SmolLM2, which answers in words: the same text through each API, tools and formats that fit."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import ollama
import openai
import pytest
from pydantic import BaseModel
from server_harness import Served

pytestmark = [pytest.mark.prove, pytest.mark.timeout(600), pytest.mark.xdist_group("smollm2-served")]

ASK: Any = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]


class City(BaseModel):
    name: str
    country: Literal["France", "Italy"]


def test_every_api_gives_the_same_answer(smollm2: Served) -> None:
    gpt = openai.OpenAI(base_url=f"{smollm2.url}/v1", api_key="none", timeout=300)
    claude = anthropic.Anthropic(base_url=smollm2.url, api_key="none", timeout=300)
    llama = ollama.Client(host=smollm2.url, timeout=300)
    chat = gpt.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_tokens=40, top_p=1)
    text = chat.choices[0].message.content or ""
    assert "Paris" in text
    greedy: Any = {"model": "smollm2", "messages": ASK, "temperature": 0, "max_tokens": 40, "top_p": 1}
    pieces = [chunk.choices[0].delta.content or "" for chunk in gpt.chat.completions.create(**greedy, stream=True)]
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 3
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        gpt.chat.completions.create(**(greedy | {"max_tokens": 0}))
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        gpt.chat.completions.create(**(greedy | {"model": "gpt-4o"}))
    answered = gpt.responses.create(model="smollm2", input=ASK, temperature=0, max_output_tokens=40, top_p=1)
    assert answered.output_text == text
    own: Any = {"temperature": 0, "top_p": 1}  # which the client's own types no longer have
    message = claude.messages.create(model="smollm2", messages=ASK, max_tokens=40, extra_body=own)
    assert message.content[0].text == text  # type: ignore[union-attr]
    with claude.messages.stream(model="smollm2", messages=ASK, max_tokens=40, extra_body=own) as stream:
        assert "".join(stream.text_stream) == text
    told = llama.chat(model="smollm2", messages=ASK, options={"temperature": 0, "num_predict": 40, "top_p": 1})
    assert told.message.content == text
    options = {"temperature": 0, "num_predict": 40, "top_p": 1}
    lines = llama.chat(model="smollm2", messages=ASK, options=options, stream=True)
    assert "".join(line.message.content or "" for line in lines) == text
    gpt.close(), claude.close(), llama._client.close()


def test_formats_and_tools(smollm2: Served) -> None:
    with openai.OpenAI(base_url=f"{smollm2.url}/v1", api_key="none", timeout=300) as gpt:
        parsed = gpt.chat.completions.parse(
            model="smollm2", messages=ASK, response_format=City, temperature=0, max_tokens=60
        )
        assert parsed.choices[0].message.parsed is not None
        assert parsed.choices[0].message.parsed.country == "France"
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
        asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
        called = gpt.chat.completions.create(
            model="smollm2", messages=asked, tools=tools, tool_choice="required", temperature=0, max_tokens=100,
            parallel_tool_calls=False,
        )  # fmt: skip
        (call,) = called.choices[0].message.tool_calls or ()
        assert call.type == "function" and call.function.name == "get_weather"
        assert "Paris" in json.loads(call.function.arguments)["city"]
