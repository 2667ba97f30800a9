"""Reading the JSON of a tool call while it is being written."""

from __future__ import annotations

import json
from typing import Literal

__all__ = ["CallScanner", "ValueScanner"]


class ValueScanner:
    """Finds where a JSON value ends. Only objects, arrays and strings are told from their inside."""

    __slots__ = ("_depth", "_escaped", "_quoted", "started")

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.started = False

    def end(self, text: str, start: int = 0) -> int:
        """Place after the value's last character, -1 if it is not in ``text[start:]``. Goes on where the text before
        ended; the first character of all is the value's first."""
        for place in range(start, len(text)):
            char = text[place]
            self.started = True
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                if char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
                    if not self._depth:
                        return place + 1
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return -1


class CallScanner:
    """One object ``{"name": …, "arguments": …}``, its keys in any order.

    ``name`` is None until it is known. Arguments are given out as they come once it is. ``parameters`` means the same;
    other keys are passed over. ``state`` ends as ``done`` or ``broken``.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.state: Literal["start", "key", "colon", "value", "after", "done", "broken"] = "start"
        self.seen_arguments = False
        self._rest = ""
        self._key = ""
        self._value: ValueScanner | None = None
        self._plain = False
        self._raw = ""
        self._kept = ""

    def feed(self, text: str) -> tuple[str, str]:
        """(arguments that are certain now, text after the object's end)."""
        self._rest += text
        out: list[str] = []
        while self._rest and self.state not in ("done", "broken"):
            if not self._step(out):
                break
        after = ""
        if self.state == "done":
            after, self._rest = self._rest, ""
            if not self.seen_arguments:
                self.seen_arguments = True
                out.append("{}")
        if self.name is None:
            self._kept += "".join(out)
            return "", after
        shown, self._kept = self._kept + "".join(out), ""
        return shown, after

    def _step(self, out: list[str]) -> bool:
        """Go on by a piece; False: more text is needed."""
        if self.state == "value":
            return self._read_value(out)
        self._rest = self._rest.lstrip()
        if not self._rest:
            return False
        char = self._rest[0]
        if self.state == "start":
            self._expect(char == "{", "key")
        elif self.state == "key":
            if char == "}":
                self._expect(True, "done")
            else:
                return self._read_key()
        elif self.state == "colon":
            self._expect(char == ":", "value")
        elif self.state == "after":
            self._expect(char in ",}", "key" if char == "," else "done")
        return True

    def _expect(self, right: bool, state: Literal["key", "value", "done"]) -> None:
        if not right:
            self.state = "broken"
            return
        self._rest = self._rest[1:]
        self.state = state

    def _read_key(self) -> bool:
        if self._rest[0] != '"':
            self.state = "broken"
            return True
        end = ValueScanner().end(self._rest)
        if end < 0:
            return False
        self._key = _text(self._rest[:end]) or ""
        self._rest = self._rest[end:]
        self.state = "colon"
        return True

    def _read_value(self, out: list[str]) -> bool:
        if self._value is None:
            self._rest = self._rest.lstrip()
            if not self._rest:
                return False
            self._value, self._raw = ValueScanner(), ""
            self._plain = self._rest[0] not in '{["'
        if self._plain:  # a number or a word: it ends before what follows it
            ends = [place for place in (self._rest.find(","), self._rest.find("}")) if place >= 0]
            end = min(ends, default=-1)
        else:
            end = self._value.end(self._rest)
        piece = self._rest if end < 0 else self._rest[:end]
        self._rest = self._rest[len(piece) :]
        first = not self._raw
        self._raw += piece
        if self._key in ("arguments", "parameters"):
            # Some models write the arguments as a string with JSON in it: that is known at its end.
            if self._raw[0] != '"' and not self._plain:
                if first and self.seen_arguments:
                    self.state = "broken"
                    return True
                self.seen_arguments = True
                out.append(piece)
            elif end >= 0:
                self.seen_arguments = True
                out.append(_text(self._raw) or "{}")
        elif self._key == "name" and end >= 0:
            self.name = _text(self._raw)
            if not self.name:
                self.state = "broken"
                return True
        if end < 0:
            return False
        self._value = None
        self.state = "after"
        return True


def _text(raw: str) -> str | None:
    """A JSON string's text; None if it is none."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
