"""Ollama's options, messages and formats in this server's own terms."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.types import StructuredOutput

__all__ = ["read_format", "read_options", "read_turns"]

_ROLES = ("system", "user", "assistant", "tool")
#: Ollama's name -> ours.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
#: Options of llama.cpp's runner, which say how to compute and not what; and samplers that it has taken out.
_IGNORED = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "use_mmap", "use_mlock", "low_vram",
     "f16_kv", "numa", "vocab_only", "logits_all", "penalize_newline", "repeat_last_n", "draft_num_predict"}
)  # fmt: skip
#: Options that would change the answer if they were not at these values.
_NEUTRAL = {"mirostat": (0,), "mirostat_tau": None, "mirostat_eta": None, "tfs_z": (1, 1.0), "typical_p": (1, 1.0)}


def read_options(options: Mapping[str, Any] | None, most_stop: int) -> dict[str, Any]:
    """Sampling options.

    Raises:
        InvalidRequestError: an option that is not known, or cannot be served.
    """
    found: dict[str, Any] = {"max_tokens": None}
    for name, value in (options or {}).items():
        if value is None or name in _IGNORED:
            continue
        if name in _OPTIONS:
            found[_OPTIONS[name]] = value
        elif name == "num_predict":
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidRequestError(f"options.num_predict: {value!r}; allowed is an integer.")
            found["max_tokens"] = value if value > 0 else None  # -1: without end, -2: fill the context
        elif name == "stop":
            stop = [value] if isinstance(value, str) else value
            if not isinstance(stop, list) or len(stop) > most_stop:
                raise InvalidRequestError(f"options.stop: allowed is a list of at most {most_stop} strings.")
            found["stop"] = tuple(text for text in stop if text != "")
        elif name in _NEUTRAL:
            neutral = _NEUTRAL[name]
            if neutral is not None and value not in neutral:
                raise InvalidRequestError(f"options.{name}: {value!r} is not supported; allowed is {neutral[0]}.")
        else:
            raise InvalidRequestError(
                f"options.{name}: unknown. Known are {', '.join([*_OPTIONS, 'num_predict', 'stop'])}."
            )
    if found.get("seed") == 0:
        del found["seed"]  # Ollama's word for "none"
    return found


def read_format(given: Any) -> StructuredOutput | None:
    """``json``, or a JSON schema.

    Raises:
        InvalidRequestError: something else.
    """
    if given is None or given == "":
        return None
    if given == "json":
        return StructuredOutput(json=True)
    if isinstance(given, Mapping):
        return StructuredOutput(json=given)
    raise InvalidRequestError(f"format: {given!r}; allowed is 'json' or a JSON schema (an object).")


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read. Calls get ids, and results those of the calls they answer.

    Raises:
        InvalidRequestError: names the message, and what is wrong with it.
    """
    out: list[dict[str, Any]] = []
    unanswered: list[tuple[str, str]] = []  # (name, id)
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role = message.get("role")
        if role not in _ROLES:
            raise InvalidRequestError(f"{where}.role: {role!r}; allowed is {', '.join(_ROLES)}.")
        if message.get("images"):
            raise InvalidRequestError(f"{where}.images: this model reads text only.")
        content = message.get("content") or ""
        if not isinstance(content, str):
            raise InvalidRequestError(f"{where}.content: expected a string.")
        turn: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            if isinstance(message.get("thinking"), str) and message["thinking"]:
                turn["reasoning_content"] = message["thinking"]
            given = message.get("tool_calls") or []
            if not isinstance(given, list):
                raise InvalidRequestError(f"{where}.tool_calls: expected a list.")
            calls = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(given)]
            if calls:
                turn["tool_calls"] = calls
                unanswered = [(call["function"]["name"], call["id"]) for call in calls]
        elif role == "tool":
            name = message.get("tool_name") or message.get("name")
            turn["tool_call_id"] = _answered(unanswered, name)
            if name:
                turn["name"] = name
        out.append(turn)
    return out


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f'{where}: expected {{"function": {{"name", "arguments"}}}}.')
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(f"{where}.function.arguments: expected an object.")
    name = call.get("id") if isinstance(call.get("id"), str) else f"call_{uuid.uuid4().hex[:24]}"
    return {"id": name, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _answered(unanswered: list[tuple[str, str]], name: Any) -> str:
    """The id of the call that a result answers: the first of its name, or the first of all."""
    for place, (called, call_id) in enumerate(unanswered):
        if name is None or called == name:
            del unanswered[place]
            return call_id
    return f"call_{uuid.uuid4().hex[:24]}"
