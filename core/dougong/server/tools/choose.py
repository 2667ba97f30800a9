"""Which way a model writes tool calls: as the operator says, or as its chat template shows."""

from __future__ import annotations

from typing import Any

from dougong.errors import ConfigError
from dougong.server.tools.format import ToolFormat
from dougong.server.tools.llama import PYTHON_TAG, Llama3
from dougong.server.tools.marked import OPEN, Hermes
from dougong.server.tools.mistral import CALLS, Mistral

__all__ = ["TOOL_FORMATS", "choose_tools"]

TOOL_FORMATS: dict[str, type[ToolFormat]] = {one.name: one for one in (Hermes, Llama3, Mistral)}


def choose_tools(name: str | None, *, tokenizer: Any, chat_template: str | None, model: str) -> ToolFormat | None:
    """The format named, or the one that the chat template or the model's name shows, Hermes' where neither does.

    Args:
        name: None or ``auto`` looks; ``none`` finds no calls.
        tokenizer: the model's; which marks are special tokens is seen from it.

    Raises:
        ConfigError: no such format.
    """
    if name == "none":
        return None
    template = chat_template or ""
    if name is None or name == "auto":
        kind = _seen(template, model.lower())
    elif name in TOOL_FORMATS:
        kind = TOOL_FORMATS[name]
    else:
        raise ConfigError(f"tool_call_parser={name!r}: allowed is auto, none, {', '.join(TOOL_FORMATS)}.")
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    found = {mark: int(tokenizer.convert_tokens_to_ids(mark)) for mark in kind.marks if mark in special}
    return kind(found, template)


def _seen(template: str, model: str) -> type[ToolFormat]:
    if OPEN in template:
        return Hermes
    if CALLS in template:
        return Mistral
    if PYTHON_TAG in template or "<|start_header_id|>" in template:
        return Llama3
    if "mistral" in model or "mixtral" in model:
        return Mistral
    if "llama-3" in model or "llama3" in model:
        return Llama3
    return Hermes
