"""The request types of the clients' own packages, field by field: each is read, accepted without a meaning, or refused
by name. None is unknown."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from anthropic.types import message_create_params as claude
from ollama import _types as llama
from openai.types import completion_create_params as completion
from openai.types import embedding_create_params as embedding
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses
from pydantic import BaseModel

from dougong.errors import InvalidRequestError
from dougong.server.anthropic import messages
from dougong.server.config import ServerConfig
from dougong.server.ollama import api, embed
from dougong.server.openai import chat as our_chat
from dougong.server.openai import completions, embeddings
from dougong.server.openai import responses as our_responses
from dougong.server.openai.fields import check_fields
from dougong.server.openai.messages import read_tool_choice, read_tools

#: The clients' requests, ours, what we refuse and what we pass over.
REQUESTS: dict[str, tuple[list[Any], type[BaseModel], Any, Any]] = {
    "chat": (
        [chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming],
        our_chat.ChatRequest, our_chat._REFUSED, our_chat._ACCEPTED,
    ),
    "completions": (
        [completion.CompletionCreateParamsNonStreaming, completion.CompletionCreateParamsStreaming],
        completions.CompletionRequest, completions._REFUSED, completions._ACCEPTED,
    ),
    "embeddings": ([embedding.EmbeddingCreateParams], embeddings.EmbeddingRequest, {}, {}),
    "responses": (
        [responses.ResponseCreateParamsNonStreaming, responses.ResponseCreateParamsStreaming],
        our_responses.ResponsesRequest, our_responses._REFUSED, our_responses._ACCEPTED,
    ),
    "anthropic": (
        [claude.MessageCreateParamsNonStreaming, claude.MessageCreateParamsStreaming],
        messages.MessagesRequest, messages._REFUSED, messages._ACCEPTED,
    ),
    "ollama chat": ([llama.ChatRequest], api.ChatRequest, api._REFUSED, api._ACCEPTED),
    "ollama generate": ([llama.GenerateRequest], api.GenerateRequest, api._REFUSED, api._ACCEPTED),
    "ollama embed": ([llama.EmbedRequest], embed.EmbedRequest, {}, embed._ACCEPTED),
    "ollama embeddings": ([llama.EmbeddingsRequest], embed.OldEmbedRequest, {}, embed._ACCEPTED),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_that_a_client_can_send_is_known(name: str) -> None:
    theirs, ours, refused, accepted = REQUESTS[name]
    fields: set[str] = set()
    for kind in theirs:
        fields |= set(kind.model_fields) if issubclass(kind, BaseModel) else set(get_type_hints(kind))
    assert len(fields) >= 3
    known = set(ours.model_fields) | set(refused) | set(accepted)
    assert fields <= known, f"unknown here: {sorted(fields - known)}"


def test_a_refused_field_says_what_to_do_and_an_accepted_one_says_nothing() -> None:
    for _, ours, refused, accepted in REQUESTS.values():
        least = {name: _sample(ours, name) for name, field in ours.model_fields.items() if field.is_required()}
        check_fields(ours(**least, **dict.fromkeys(accepted, 1)), ServerConfig(), refused, frozenset(accepted))
        for name, advice in refused.items():
            with pytest.raises(InvalidRequestError, match=f"{name} is not supported: {advice}"):
                check_fields(ours(**least, **{name: 1}), ServerConfig(), refused, frozenset(accepted))


def _sample(model: type[BaseModel], name: str) -> Any:
    return {"messages": [{}], "max_tokens": 1}.get(name, "x")


def test_a_null_means_that_a_field_was_left_out() -> None:
    for name in ("chat", "completions", "embeddings", "responses"):
        ours = REQUESTS[name][1]
        least = {field: _sample(ours, field) for field, one in ours.model_fields.items() if one.is_required()}
        openais = {field for kind in REQUESTS[name][0] for field in get_type_hints(kind)}
        nulls = dict.fromkeys(sorted((openais & set(ours.model_fields)) - set(least)))
        assert ours(**least, **nulls) == ours(**least), name
    own = ["ignore_eos", "priority", "skip_special_tokens", "add_generation_prompt", "include_reasoning"]
    assert our_chat.ChatRequest(messages=[{}], **dict.fromkeys(own)) == our_chat.ChatRequest(messages=[{}])


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_every_shape_of_a_tool_choice() -> None:
    tools = read_tools([tool("a"), tool("b"), tool("c")])
    assert read_tool_choice(None, tools) == read_tool_choice("auto", tools) == ("auto", tools)
    assert read_tool_choice("none", []) == ("none", [])
    assert read_tool_choice("required", tools) == ("required", tools)
    assert read_tool_choice(tool("b"), tools) == ({"name": "b"}, tools)
    for mode in ("auto", "required"):
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [tool("c"), tool("a")]}}
        assert read_tool_choice(allowed, tools) == (mode, [tool("a"), tool("c")])
    for wrong in (
        "any", tool("d"), {"type": "custom", "custom": {"name": "a"}}, {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("d")]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [tool("a")]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": 5}}, {"function": {"name": ["a"]}},
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="a, b, c"):
            read_tool_choice(wrong, tools)
