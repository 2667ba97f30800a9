"""The items of OpenAI's Responses API: what comes in as messages, and an answer's blocks as what goes out."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.server.chat.blocks import Block
from dougong.server.chat.turn import ToolChoice

__all__ = ["as_items", "item_of", "read_items", "read_response_choice", "read_response_tools", "text_part"]

_ROLES = ("system", "developer", "user", "assistant")
_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


def as_items(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A request's input as items, each with an id."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = []
    for one in given:
        item = dict(one)
        if "type" not in item and "role" in item:
            item["type"] = "message"
        if item.get("type") == "message" and isinstance(item.get("content"), str):
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [{"type": kind, "text": item["content"]}]
        if not item.get("id"):
            item["id"] = f"{'msg' if item.get('type') == 'message' else 'item'}_{uuid.uuid4().hex}"
        items.append(item)
    return items


def read_items(instructions: str | None, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items in the form that chat templates read; calls and thoughts join the assistant's message they belong to.

    Raises:
        InvalidRequestError: names the item, and what is wrong with it.
    """
    out: list[dict[str, Any]] = []
    if instructions:
        out.append({"role": "system", "content": instructions})

    def assistant() -> dict[str, Any]:
        """The present message of the assistant, which what follows belongs to."""
        if not out or out[-1]["role"] != "assistant":
            out.append({"role": "assistant", "content": ""})
        return out[-1]

    for place, item in enumerate(items):
        where = f"input[{place}]"
        kind = item.get("type")
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise InvalidRequestError(f"{where}.role={role!r}: allowed is {', '.join(_ROLES)}.")
            text = _text(f"{where}.content", item.get("content"))
            if role == "assistant" and out and out[-1]["role"] == "assistant" and not out[-1]["content"]:
                out[-1]["content"] = text
            else:
                out.append({"role": "system" if role == "developer" else role, "content": text})
        elif kind == "function_call":
            function = {"name": _string(where, item, "name"), "arguments": _arguments(where, item)}
            call = {"id": _string(where, item, "call_id"), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            text = _text(f"{where}.output", item.get("output"))
            out.append({"role": "tool", "tool_call_id": _string(where, item, "call_id"), "content": text})
        elif kind == "reasoning":
            text = _text(f"{where}.content", item.get("content") or item.get("summary") or [])
            if text:
                assistant()["reasoning_content"] = text
        else:
            raise InvalidRequestError(
                f"{where}.type={kind!r}: allowed is message, function_call, function_call_output and reasoning."
            )
    if not any(message["role"] != "system" for message in out):
        raise InvalidRequestError("input: give at least one item besides instructions.")
    return out


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: expected a string or a list of parts.")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in _TEXTS or not isinstance(text, str):
            raise InvalidRequestError(f"{where}[{i}].type={kind!r}: this model reads text only.")
        texts.append(text)
    return "\n".join(texts)


def _arguments(where: str, item: Mapping[str, Any]) -> Any:
    """As an object, which templates like better; what a model wrote need not be JSON, and is then shown as it is."""
    text = _string(where, item, "arguments")
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _string(where: str, item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.{name}: expected a string.")
    return value


def read_response_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Functions in the form of the chat API.

    Raises:
        InvalidRequestError: a tool that OpenAI's servers run, or one without a name of its own.
    """
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            raise InvalidRequestError(f"tools[{i}].type={tool.get('type')!r}: allowed is 'function'.")
        name, schema = tool.get("name"), tool.get("parameters")
        if not isinstance(name, str) or not name or name in names:
            raise InvalidRequestError(f"tools[{i}].name={name!r}: each tool needs a name of its own.")
        if schema is not None and not isinstance(schema, Mapping):
            raise InvalidRequestError(f"tools[{i}].parameters: expected a JSON schema (an object).")
        names.add(name)
        function = {"name": name, "description": tool.get("description") or "", "parameters": dict(schema or {})}
        found.append({"type": "function", "function": function})
    return found


def read_response_choice(choice: Any, tools: list[dict[str, Any]]) -> tuple[ToolChoice, list[dict[str, Any]]]:
    """(the choice, the tools that may be called).

    Raises:
        InvalidRequestError: no such choice, or a tool that is not there.
    """
    if choice is None or choice in ("auto", "none"):
        return choice or "auto", tools
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and tools:
        return "required", tools
    if isinstance(choice, Mapping):
        if choice.get("type") == "function" and choice.get("name") in names:
            return {"name": str(choice["name"])}, tools
        allowed = choice.get("tools")
        if choice.get("type") == "allowed_tools" and isinstance(allowed, list):
            wanted = [one.get("name") for one in allowed if isinstance(one, Mapping)]
            left = [tool for tool in tools if tool["function"]["name"] in wanted]
            if left and len(left) == len(allowed) and choice.get("mode") in ("auto", "required"):
                return choice["mode"], left
    raise InvalidRequestError(
        f"tool_choice={choice!r}: allowed is 'auto', 'none', 'required', a function, or allowed_tools, out of {names}."
    )


def text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def item_of(block: Block, name: str, status: str, logprobs: list[Any]) -> dict[str, Any]:
    """An output item. While its status is ``in_progress`` it is empty.

    Args:
        name: its id, without what tells its kind.
        logprobs: in the API's form.
    """
    begun = status == "in_progress"
    if block.kind == "call":
        return {
            "id": f"fc_{name}",
            "type": "function_call",
            "status": status,
            "call_id": block.call_id,
            "name": block.name,
            "arguments": "" if begun else block.text,
        }
    if block.kind == "reasoning":
        content = [] if begun else [{"type": "reasoning_text", "text": block.text}]
        return {"id": f"rs_{name}", "type": "reasoning", "status": status, "summary": [], "content": content}
    parts = [] if begun else [text_part(block.text, logprobs)]
    return {"id": f"msg_{name}", "type": "message", "status": status, "role": "assistant", "content": parts}
