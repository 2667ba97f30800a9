"""Messages of OpenAI's chat API: checked, and in the form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.server.chat.turn import ToolChoice

__all__ = ["read_messages", "read_tool_choice", "read_tools"]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text content as one string, ``developer`` as ``system``, and tool arguments as objects.

    Raises:
        InvalidRequestError: names the message, and what is wrong with it.
    """
    if not messages:
        raise InvalidRequestError("messages: give at least one.")
    return [_message(place, message) for place, message in enumerate(messages)]


def _message(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{place}]"
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequestError(f"{where}.role={role!r}: allowed is {', '.join(_ROLES)}.")
    out = {name: value for name, value in message.items() if value is not None and name not in ("refusal", "audio")}
    out["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    content = message.get("content")
    calls = message.get("tool_calls")
    if content is None:
        if role != "assistant":
            raise InvalidRequestError(f"{where}.content: a {role} message needs it.")
        out["content"] = ""
    else:
        out["content"] = _content(f"{where}.content", content)
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list):
            raise InvalidRequestError(f"{where}.tool_calls: allowed is a list, in an assistant message.")
        out["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
        if not calls:
            del out["tool_calls"]
    return out


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: allowed is a string or a list of parts, found {type(content).__name__}.")
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal"):
            raise InvalidRequestError(f"{where}[{i}].type={kind!r}: this model reads text only; allowed is 'text'.")
        if not isinstance(text, str):
            raise InvalidRequestError(f"{where}[{i}].text: expected a string.")
        texts.append(text)
    return "\n".join(texts)


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(
            f'{where}: expected {{"id", "type": "function", "function": {{"name", "arguments"}}}}.'
        )
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            pass  # what a model wrote in an earlier turn need not be JSON; the template shows it as it is
    return {**call, "function": {**function, "arguments": arguments}}


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools, each a function with a name of its own.

    Raises:
        InvalidRequestError: names the tool, and what is wrong with it.
    """
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise InvalidRequestError(f'tools[{i}]: allowed is {{"type": "function", "function": {{"name", …}}}}.')
        name = function.get("name")
        if not isinstance(name, str) or not name or name in names:
            raise InvalidRequestError(f"tools[{i}].function.name={name!r}: each tool needs a name of its own.")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InvalidRequestError(f"tools[{i}].function.parameters: expected a JSON schema (an object).")
        names.add(name)
        found.append(dict(tool))
    return found


def read_tool_choice(choice: Any, tools: list[dict[str, Any]]) -> tuple[ToolChoice, list[dict[str, Any]]]:
    """(the choice, the tools that may be called).

    Raises:
        InvalidRequestError: another value, a tool that is not there, or a choice without tools.
    """
    if choice is None or choice == "auto":
        return "auto", tools
    if choice == "none":
        return "none", tools
    if not tools:
        raise InvalidRequestError(f"tool_choice={choice!r} without tools: give tools, or leave it out.")
    if choice == "required":
        return "required", tools
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools")
            mode, given = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, Mapping) else (None, None)
            wanted = [_named(one) for one in given] if isinstance(given, list) else []
            if wanted and mode in ("auto", "required") and all(name in names for name in wanted):
                return mode, [tool for tool in tools if tool["function"]["name"] in wanted]
        elif (name := _named(choice)) in names:
            return {"name": name}, tools
    raise InvalidRequestError(
        f"tool_choice={choice!r}: allowed is 'auto', 'none', 'required', a function, or allowed_tools, out of "
        f"{', '.join(names)}."
    )


def _named(tool: Any) -> Any:
    """The name in ``{"type": "function", "function": {"name": …}}``."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None
