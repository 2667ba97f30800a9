"""Llama 3's calls: an answer that is ``{"name": …, "parameters": …}``, or ``[name(key=value), …]`` (3.2 and later).

Nothing but the answer's first character marks them, so an object counts as a call only if it names a tool.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dougong.server.chat.turn import TextDelta, ToolCallDelta
from dougong.server.holding import held_length
from dougong.server.tools.format import Piece, ToolFormat, ToolParser, new_id, quoted
from dougong.server.tools.scan import CallScanner

__all__ = ["Llama3", "LlamaParser"]

PYTHON_TAG = "<|python_tag|>"
#: Special tokens that may end or frame an answer, and are no text.
_FRAME = ("<|eom_id|>", "<|eot_id|>")


class Llama3(ToolFormat):
    """As Meta's prompt format describes zero-shot function calling."""

    name: ClassVar[str] = "llama3"
    marks: ClassVar[tuple[str, ...]] = (PYTHON_TAG, *_FRAME)

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        return LlamaParser([tool["function"]["name"] for tool in tools])

    def rules(self, names: Sequence[str], parallel: bool) -> str:
        calls = [
            f"call_{i}: {quoted(f'{chr(123)}' + _head(name))} args_{i} {quoted('}')}" for i, name in enumerate(names)
        ]
        return "\n".join(["calls: " + " | ".join(f"call_{i}" for i in range(len(names))), *calls])


def _head(name: str) -> str:
    return f'"name": {quoted(name)}, "parameters": '


class LlamaParser(ToolParser):
    """Decides at the answer's first character, and again after each call."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._state = "start"  # text, json, python
        self._scanner: CallScanner | None = None
        self._raw = ""
        self._count = 0
        self._named = False

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        while self._advance(out):
            pass
        return out

    def finish(self) -> list[Piece]:
        out: list[Piece] = []
        if self._state == "python":
            self._python(out)
        elif self._state == "json":
            if not self._named:
                self._text(out, self._raw)
        elif self._state == "text" or self._held.strip():
            self._text(out, self._held)
        self._held = ""
        return out

    def _advance(self, out: list[Piece]) -> bool:
        """Go on by a state; False: more text is needed."""
        if self._state == "start":
            return self._start(out)
        if self._state == "json":
            return self._json(out)
        if self._state == "text":
            return self._plain(out)
        return False  # a list of Python calls is read as a whole

    def _start(self, out: list[Piece]) -> bool:
        text = self._held.lstrip()
        if self._count:
            text = text.lstrip("; \n")
        if not text or (len(text) < len(PYTHON_TAG) and PYTHON_TAG.startswith(text)):
            return False
        if text.startswith(PYTHON_TAG):
            self._held = text[len(PYTHON_TAG) :]
            return True
        if text[0] == "{":
            self._state, self._held = "json", text
            self._scanner, self._raw, self._named = CallScanner(), "", False
        elif text[0] == "[" and not self._count:
            self._state, self._held = "python", text
        else:
            self._state = "text"
        return True

    def _json(self, out: list[Piece]) -> bool:
        scanner = self._scanner
        assert scanner is not None
        piece, self._held = self._held, ""
        arguments, after = scanner.feed(piece)
        self._raw += piece[: len(piece) - len(after)]
        if not self._named:
            known = scanner.name
            if scanner.state == "broken" or (known is not None and known not in self._names) or (
                scanner.state == "done" and known is None
            ):  # fmt: skip
                self._text(out, self._raw)
                self._held, self._state = after, "text"
                return True
            if known is not None:
                self._named = True
                out.append(ToolCallDelta(0, self._count, new_id(), known, arguments))
                self._count += 1
        elif arguments:
            out.append(ToolCallDelta(0, self._count - 1, arguments=arguments))
        if scanner.state in ("done", "broken"):
            self._held, self._state = after, "start"
            return bool(after)
        return False

    def _plain(self, out: list[Piece]) -> bool:
        place = self._held.find(PYTHON_TAG)
        if place >= 0:
            self._text(out, self._held[:place].rstrip())
            self._held, self._state = self._held[place + len(PYTHON_TAG) :], "start"
            return True
        keep = held_length(self._held, (PYTHON_TAG, *_FRAME))
        self._text(out, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _python(self, out: list[Piece]) -> None:
        text = _unframed(self._held)
        calls = _python_calls(text, self._names)
        if calls is None:
            self._text(out, self._held)
            return
        for name, arguments in calls:
            out.append(ToolCallDelta(0, self._count, new_id(), name, json.dumps(arguments, ensure_ascii=False)))
            self._count += 1

    @staticmethod
    def _text(out: list[Piece], text: str) -> None:
        text = _unframed(text)
        if text:
            out.append(TextDelta(0, text))


def _unframed(text: str) -> str:
    for mark in _FRAME:
        text = text.replace(mark, "")
    return text


def _python_calls(text: str, names: frozenset[str]) -> list[tuple[str, dict[str, Any]]] | None:
    """The calls of ``[name(key=value), …]``, values being literals; None: it is something else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.List) or not tree.elts:
        return None
    calls = []
    for one in tree.elts:
        if not isinstance(one, ast.Call) or one.args:
            return None
        name = ast.unparse(one.func)
        if name not in names or any(keyword.arg is None for keyword in one.keywords):
            return None
        try:
            arguments = {str(keyword.arg): _literal(keyword.value) for keyword in one.keywords}
        except (ValueError, TypeError, RecursionError):
            return None
        calls.append((name, arguments))
    return calls


def _literal(node: ast.expr) -> Any:
    """A literal of Python or, as models also write them, of JSON.

    Raises:
        ValueError: it is none, or no JSON value.
    """
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(key)): _literal(value) for key, value in zip(node.keys, node.values) if key is not None}
    value = ast.literal_eval(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError(f"{type(value).__name__} is no JSON value")
    return value
