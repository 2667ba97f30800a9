"""Calls between marks: ``<tool_call>{"name": …, "arguments": …}</tool_call>`` (Hermes, Qwen 2.5 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from dougong.server.chat.turn import TextDelta, ToolCallDelta
from dougong.server.holding import find_first, held_length
from dougong.server.tools.format import MOST_CALLS, Piece, ToolFormat, ToolParser, new_id, quoted
from dougong.server.tools.scan import CallScanner

__all__ = ["Hermes", "MarkedParser"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """NousResearch's Hermes function calling, which Qwen's chat templates use too."""

    name: ClassVar[str] = "hermes"
    marks: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        return MarkedParser()

    def rules(self, names: Sequence[str], parallel: bool) -> str:
        more = f'("\\n" call)~0..{MOST_CALLS - 1}' if parallel else ""
        calls = [
            f"call_{i}: {quoted(f'{chr(10)}{chr(123)}' + _head(name))} args_{i} {quoted('}' + chr(10))}"
            for i, name in enumerate(names)
        ]
        either = " | ".join(f"call_{i}" for i in range(len(names)))
        return "\n".join(
            [f"calls: call {more}", f"call: {self.mark(OPEN)} body {self.mark(CLOSE)}", f"body: {either}", *calls]
        )


def _head(name: str) -> str:
    return f'"name": {quoted(name)}, "arguments": '


class MarkedParser(ToolParser):
    """Text, and between marks objects that are calls. What stands between marks and is none is given out as text."""

    def __init__(self, new_id: Callable[[], str] = new_id) -> None:
        self._new_id = new_id
        self._held = ""
        self._scanner: CallScanner | None = None
        self._raw = ""
        self._count = 0
        self._named = False
        self._shown = False  # whether any text was given out
        self._closing = False  # the call is complete: what follows up to its mark is passed over

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        while self._outside(out) if self._scanner is None else self._inside(out):
            pass
        return out

    def finish(self) -> list[Piece]:
        out: list[Piece] = []
        if self._scanner is None:
            text = self._held if not self._count else self._held.rstrip()
            self._text(out, text)
        elif not self._named:
            self._text(out, OPEN + self._raw + self._held)
        self._held = ""
        return out

    def _outside(self, out: list[Piece]) -> bool:
        """Give text out up to the next call; True: there is one."""
        place = self._held.find(OPEN)
        if place >= 0:
            self._text(out, self._held[:place].rstrip())
            self._held = self._held[place + len(OPEN) :]
            self._scanner, self._raw, self._named, self._closing = CallScanner(), "", False, False
            return True
        sure = self._held[: len(self._held) - held_length(self._held, (OPEN,))]
        kept = sure.rstrip()  # white space before a call is no text
        self._text(out, kept)
        self._held = self._held[len(kept) :]
        return False

    def _inside(self, out: list[Piece]) -> bool:
        """Read on in a call; True: it is over and text may follow."""
        scanner = self._scanner
        assert scanner is not None
        if not self._closing:
            piece, self._held = self._held, ""
            arguments, after = scanner.feed(piece)
            self._raw += piece[: len(piece) - len(after)]
            self._call(out, scanner, arguments)
            if scanner.state == "broken" and not self._named:
                # No call: all of it is text, and another mark may stand in it.
                raw, self._raw, self._scanner = self._raw, "", None
                self._text(out, OPEN)
                self._held = raw
                return True
            if scanner.state not in ("done", "broken"):
                return False
            self._closing, self._held = True, after
            if scanner.state == "broken":
                self._held = piece
        found = find_first(self._held, (CLOSE, OPEN))
        if found is None:
            return False
        # A model that forgot the closing mark begins the next call.
        place, mark = found
        self._held = self._held[place + (len(CLOSE) if mark == CLOSE else 0) :]
        self._scanner = None
        return True

    def _call(self, out: list[Piece], scanner: CallScanner, arguments: str) -> None:
        if scanner.name is None:
            return
        if not self._named:
            if scanner.state == "broken":
                return
            self._named = True
            out.append(ToolCallDelta(0, self._count, self._new_id(), scanner.name, arguments))
            self._count += 1
        elif arguments:
            out.append(ToolCallDelta(0, self._count - 1, arguments=arguments))

    def _text(self, out: list[Piece], text: str) -> None:
        if self._count and not self._shown:
            text = text.lstrip()  # between calls
        if text:
            self._shown = True
            out.append(TextDelta(0, text))
