"""Telling a model of its tools whose chat template knows none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["knows_tools", "written_out"]

_HEAD = """You may call functions to help with the user's request. They are listed as JSON, one a line:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>"""


def knows_tools(chat_template: str | None) -> bool:
    """Whether a chat template shows tools to the model."""
    return "tools" in (chat_template or "")


def written_out(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation in roles and text alone, in Hermes' form: tools in the system message, calls in the
    assistant's, results in the user's."""
    out = [_plain(message) for message in messages]
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        head = _HEAD.format(tools=lines)
        if out and out[0]["role"] == "system":
            out[0]["content"] = f"{out[0]['content']}\n\n{head}"
        else:
            out.insert(0, {"role": "system", "content": head})
    merged: list[dict[str, Any]] = []
    for message in out:
        answers = merged and message["role"] == "user" == merged[-1]["role"]
        if answers and message["content"].startswith("<tool_response>"):
            merged[-1]["content"] += "\n" + message["content"]
        else:
            merged.append(message)
    return merged


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [f"<tool_call>\n{_call(call['function'])}\n</tool_call>" for call in message.get("tool_calls") or ()]
    return {"role": message["role"], "content": "\n".join([content] * bool(content) + calls)}


def _call(function: Mapping[str, Any]) -> str:
    return json.dumps({"name": function["name"], "arguments": function.get("arguments", {})}, ensure_ascii=False)
