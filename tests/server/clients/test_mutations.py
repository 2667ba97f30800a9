"""Every place of every API's request, replaced by what does not belong there: the answer is 2xx or 4xx, never 5xx, and
a good request that comes with it is answered as always."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_harness import Served, with_app

pytestmark = [pytest.mark.prove, pytest.mark.timeout(300), pytest.mark.xdist_group("clients")]

SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": FUNCTION}
CALL: Any = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
SAMPLING: Any = {
    "model": "tiny", "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 1, "stop": ["x"], "logit_bias": {"97": 1},
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "user": "u", "stream": False, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.1, "min_tokens": 0, "stop_token_ids": [5], "bad_words": ["bad"],
    "ignore_eos": False, "skip_special_tokens": True, "priority": 0, "cache_salt": "s", "request_id": None,
}  # fmt: skip
#: Valid requests with as many of their fields as go together.
REQUESTS: list[tuple[str, Any]] = [
    ("/v1/chat/completions", SAMPLING | {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "tool_call_id": "a", "content": "warm"},
        ],
        "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "max_completion_tokens": 1,
        "logprobs": True, "top_logprobs": 1, "stream_options": {"include_usage": True}, "reasoning_effort": "low",
        "modalities": ["text"], "chat_template_kwargs": {"x": 1}, "metadata": {"a": "b"}, "store": False,
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "tools": [TOOL],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}},
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
    }),
    ("/v1/completions", SAMPLING | {"prompt": [[97, 98], [99]], "max_tokens": 1, "echo": True, "logprobs": 1,
                                    "best_of": 1, "structured_outputs": {"choice": ["aa", "a"]}}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "stream": True, "suffix": None,
                         "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8,
                        "user": "u", "pooling": "mean", "normalize": True}),
    ("/v1/responses", {
        "model": "tiny", "instructions": "Be brief.", "max_output_tokens": 1, "temperature": 0.5, "top_p": 0.9,
        "input": [
            {"role": "user", "content": "a"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "warm"},
        ],
        "tools": [{"type": "function", "strict": True, **FUNCTION}], "tool_choice": "auto",
        "parallel_tool_calls": True, "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "top_logprobs": 1, "truncation": "disabled",
        "store": True, "include": ["message.output_text.logprobs"], "user": "u",
    }),
    ("/v1/messages", {
        "model": "tiny", "max_tokens": 1, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "stop_sequences": ["x"],
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "warm"}]},
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low", "format": None},
        "metadata": {"user_id": "u"}, "stream": False,
    }),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "system": "b"}),
    ("/api/chat", {
        "model": "tiny", "stream": False, "think": False, "keep_alive": "5m", "format": "json",
        "logprobs": True, "top_logprobs": 1,
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "thinking": "hm",
             "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
            {"role": "tool", "content": "warm", "tool_name": "weather"},
        ],
        "tools": [TOOL],
        "options": {"num_predict": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
                    "stop": ["x"], "repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
                    "mirostat": 0, "tfs_z": 1, "num_ctx": 100},
    }),
    ("/api/generate", {"model": "tiny", "prompt": "a", "system": "b", "raw": False, "suffix": "", "images": None,
                       "options": {"num_predict": 1}, "stream": True, "format": SCHEMA}),
    ("/api/embed", {"model": "tiny", "input": ["a"], "truncate": True, "dimensions": 8, "options": {}}),
    ("/api/embeddings", {"model": "tiny", "prompt": "a", "keep_alive": 5}),
    ("/api/show", {"model": "tiny", "verbose": True}),
    ("/tokenize", {"model": "tiny", "prompt": "a", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "add_generation_prompt": True}),
    ("/detokenize", {"model": "tiny", "tokens": [97, 98]}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 0, 1 << 31, 10**30, -(10**30), 0.5, 1e308, "", "x", "\u00b2", "9" * 5000, "\0", [], [None], [[]],
    ["x"], [10**30], {}, {"": None}, {"type": "x"}, {"x": [{}]},
]  # fmt: skip


def places(body: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything below ``body``."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    out = copy.deepcopy(body)
    inner = out
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return out


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_that_does_not_belong_somewhere_is_a_fault_of_the_server(roomy: Served, path: str, body: Any) -> None:
    good: Any = {"prompt": "ab", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    faults: list[str] = []

    async def ask(client: httpx.AsyncClient) -> None:
        first = await client.post(path, content=json.dumps(body))
        assert first.status_code == 200, first.text
        wanted = (await client.post("/v1/completions", json=good)).json()["choices"]
        for at in places(body):
            sent = [json.dumps(changed(body, at, value)) for value in ODD]
            answers = [client.post(path, content=one) for one in sent]
            beside, *rest = await asyncio.gather(client.post("/v1/completions", json=good), *answers)
            assert beside.json()["choices"] == wanted, at
            for one, answer in zip(sent, rest):
                # A stream's failures come after its status.
                if answer.status_code >= 500 or '"error": {"message": "the server failed' in answer.text:
                    faults.append(f"{answer.status_code} {'.'.join(map(str, at))}: {answer.text[:200]} <- {one[:300]}")

    with_app(roomy, ask, request_timeout_s=20.0)
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])
    roomy.wait_idle()
