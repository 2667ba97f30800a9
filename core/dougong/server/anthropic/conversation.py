"""Anthropic's messages and tools in the form that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.server.chat.turn import ToolChoice

__all__ = ["read_conversation", "read_tool_choice", "read_tools"]

_ROLES = ("user", "assistant", "system")


def read_conversation(system: Any, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All messages, the system's first.

    Raises:
        InvalidRequestError: names the message and block, and what is wrong with it.
    """
    if not messages:
        raise InvalidRequestError("messages: give at least one.")
    out: list[dict[str, Any]] = []
    if system:
        out.append({"role": "system", "content": _text("system", system)})
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        role = message.get("role")
        if role not in _ROLES:
            raise InvalidRequestError(f"{where}.role: {role!r}; allowed is {', '.join(_ROLES)}.")
        content = message.get("content")
        if isinstance(content, str):
            out.append({"role": role, "content": content})
        elif not isinstance(content, list):
            raise InvalidRequestError(f"{where}.content: expected a string or a list of blocks.")
        elif role == "assistant":
            out.append(_assistant(where, content))
        else:
            out += _user(where, role, content)
    return out


def _user(where: str, role: str, content: list[Any]) -> list[dict[str, Any]]:
    """Results of tools come first, each a message of its own; then the text."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(content):
        at = f"{where}.content.{i}"
        kind = _kind(at, block)
        if kind == "tool_result":
            text = _text(f"{at}.content", block.get("content") or "")
            if block.get("is_error"):
                text = f"Error: {text}"
            results.append({"role": "tool", "tool_call_id": _string(at, block, "tool_use_id"), "content": text})
        elif kind == "text":
            texts.append(_string(at, block, "text"))
        else:
            raise _unread(at, kind)
    if texts or not results:
        results.append({"role": role, "content": "\n".join(texts)})
    return results


def _assistant(where: str, content: list[Any]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        at = f"{where}.content.{i}"
        kind = _kind(at, block)
        if kind == "text":
            texts.append(_string(at, block, "text"))
        elif kind == "thinking":
            thoughts.append(_string(at, block, "thinking"))
        elif kind == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, Mapping):
                raise InvalidRequestError(f"{at}.input: expected an object.")
            function = {"name": _string(at, block, "name"), "arguments": dict(arguments)}
            calls.append({"id": _string(at, block, "id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            raise _unread(at, kind)
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(where: str, content: Any) -> str:
    """A string, or blocks of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: expected a string or a list of text blocks.")
    texts = []
    for i, block in enumerate(content):
        at = f"{where}.{i}"
        kind = _kind(at, block)
        if kind != "text":
            raise _unread(at, kind)
        texts.append(_string(at, block, "text"))
    return "\n".join(texts)


def _kind(where: str, block: Any) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{where}.type: expected a block with a type.")
    return kind


def _string(where: str, block: Mapping[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.{name}: expected a string.")
    return value


def _unread(where: str, kind: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{where}.type: {kind!r} cannot be read: this model takes text; allowed are text, thinking, tool_use and "
        "tool_result, each where it belongs."
    )


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools in OpenAI's form.

    Raises:
        InvalidRequestError: a tool that runs on Anthropic's servers, without a schema, or of a name that is taken.
    """
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            raise InvalidRequestError(
                f"tools.{i}.type: {tool.get('type')!r} is run by Anthropic's servers; allowed is 'custom'."
            )
        name, schema = tool.get("name"), tool.get("input_schema")
        if not isinstance(name, str) or not name or name in names:
            raise InvalidRequestError(f"tools.{i}.name: {name!r}; each tool needs a name of its own.")
        if not isinstance(schema, Mapping):
            raise InvalidRequestError(f"tools.{i}.input_schema: expected a JSON schema (an object).")
        names.add(name)
        function = {"name": name, "description": tool.get("description") or "", "parameters": dict(schema)}
        found.append({"type": "function", "function": function})
    return found


def read_tool_choice(choice: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolChoice, bool]:
    """(the choice, whether several calls are allowed).

    Raises:
        InvalidRequestError: no such choice, or a tool that is not there.
    """
    if choice is None:
        return "auto", True
    kind = choice.get("type")
    parallel = not choice.get("disable_parallel_tool_use", False)
    if kind in ("auto", "none"):
        return kind, parallel
    names = [tool["function"]["name"] for tool in tools]
    if kind == "any" and names:
        return "required", parallel
    if kind == "tool" and choice.get("name") in names:
        return {"name": str(choice["name"])}, parallel
    raise InvalidRequestError(
        f"tool_choice: {dict(choice)!r}; allowed is auto, none, any, or tool with a name out of {names} (give tools)."
    )
