"""Mistral's calls: ``[TOOL_CALLS]`` and a list of objects, or (from tokenizer v11 on) mark, name and arguments each."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dougong.server.chat.turn import TextDelta, ToolCallDelta
from dougong.server.holding import held_length
from dougong.server.tools.format import MOST_CALLS, Piece, ToolFormat, ToolParser, quoted
from dougong.server.tools.scan import CallScanner, ValueScanner

__all__ = ["Mistral", "MistralParser"]

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(\[ARGS\])?\s*(?=\{)")
#: What a name may become as long as no brace was seen.
_NAME_BEGUN = re.compile(r"\s*[\w.-]*(?:\[[A-Z_]*\]?\w*\[?[A-Z]*\]?)?\s*")


class Mistral(ToolFormat):
    """Both of the ways that Mistral's tokenizers know; which one to force is seen from the chat template."""

    name: ClassVar[str] = "mistral"
    marks: ClassVar[tuple[str, ...]] = (CALLS, ARGS, CALL_ID)

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        return MistralParser()

    def rules(self, names: Sequence[str], parallel: bool) -> str:
        either = " | ".join(f"call_{i}" for i in range(len(names)))
        if ARGS in self.template:
            more = f"call~0..{MOST_CALLS - 1}" if parallel else ""
            calls = [f"call_{i}: {quoted(name)} {self.mark(ARGS)} args_{i}" for i, name in enumerate(names)]
            return "\n".join([f"calls: call {more}", f"call: {self.mark(CALLS)} body", f"body: {either}", *calls])
        more = f'(", " call)~0..{MOST_CALLS - 1}' if parallel else ""
        calls = [f"call_{i}: {quoted('{' + _head(name))} args_{i} {quoted('}')}" for i, name in enumerate(names)]
        return "\n".join([f'calls: {self.mark(CALLS)} "[" call {more} "]"', f"call: {either}", *calls])


def _head(name: str) -> str:
    return f'"name": {quoted(name)}, "arguments": '


class MistralParser(ToolParser):
    """Text up to the mark; after it calls only."""

    def __init__(self) -> None:
        self._held = ""
        self._state = "text"  # mark, list, object, arguments; rest: no calls after all
        self._scanner: CallScanner | None = None
        self._value: ValueScanner | None = None
        self._count = 0
        self._named = False
        self._name = ""

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        while self._advance(out):
            pass
        return out

    def finish(self) -> list[Piece]:
        out: list[Piece] = []
        if self._state == "text" and self._held:
            out.append(TextDelta(0, self._held))
        elif self._state == "mark" and self._held.strip():
            out.append(TextDelta(0, CALLS + self._held))
        self._held = ""
        return out

    def _advance(self, out: list[Piece]) -> bool:
        """Go on by a state; False: more text is needed."""
        if self._state == "text":
            return self._text(out)
        if self._state == "mark":
            return self._mark()
        if self._state == "list":
            return self._list()
        if self._state == "object":
            return self._object(out)
        if self._state == "rest":
            if self._held:
                out.append(TextDelta(0, self._held))
            self._held = ""
            return False
        return self._arguments(out)

    def _text(self, out: list[Piece]) -> bool:
        place = self._held.find(CALLS)
        if place < 0:
            sure = self._held[: len(self._held) - held_length(self._held, (CALLS,))].rstrip()
            if sure:
                out.append(TextDelta(0, sure))
            self._held = self._held[len(sure) :]
            return False
        before = self._held[:place].rstrip()
        if before:
            out.append(TextDelta(0, before))
        self._held, self._state = self._held[place + len(CALLS) :], "mark"
        return True

    def _mark(self) -> bool:
        """Right behind the mark: a list, or a name."""
        text = self._held.lstrip()
        if not text:
            return False
        if text[0] == "[":
            self._held, self._state = text[1:], "list"
            return True
        found = _NAME.match(text)
        if found is not None:
            self._name = found[1]
            self._held, self._state = text[found.end() :], "arguments"
            self._value, self._named = ValueScanner(), False
            return True
        if not _NAME_BEGUN.fullmatch(text):
            self._held, self._state = CALLS + self._held, "rest"
            return True
        return False

    def _list(self) -> bool:
        text = self._held.lstrip(", \n")
        if not text:
            self._held = ""
            return False
        if text[0] == "{":
            self._held, self._state = text, "object"
            self._scanner, self._named = CallScanner(), False
            return True
        self._held, self._state = text[1:] if text[0] == "]" else text, "text"
        return bool(self._held)

    def _object(self, out: list[Piece]) -> bool:
        scanner = self._scanner
        assert scanner is not None
        piece, self._held = self._held, ""
        arguments, after = scanner.feed(piece)
        if scanner.name is not None:
            self._give(out, scanner.name, arguments)
        if scanner.state not in ("done", "broken"):
            return False
        self._held, self._state = after, "list"
        return bool(after)

    def _arguments(self, out: list[Piece]) -> bool:
        assert self._value is not None
        end = self._value.end(self._held)
        piece = self._held if end < 0 else self._held[:end]
        self._held = self._held[len(piece) :]
        self._give(out, self._name, piece)
        if end < 0:
            return False
        self._state = "text"
        return bool(self._held)

    def _give(self, out: list[Piece], name: str, arguments: str) -> None:
        if not self._named:
            self._named = True
            out.append(ToolCallDelta(0, self._count, _short_id(), name, arguments))
            self._count += 1
        elif arguments:
            out.append(ToolCallDelta(0, self._count - 1, arguments=arguments))


def _short_id() -> str:
    """Mistral's chat templates take ids of exactly nine letters and digits."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))
