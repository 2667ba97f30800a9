"""Telling a model's thinking from its answer, while both stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dougong.errors import ConfigError
from dougong.server.holding import held_length

__all__ = ["REASONING_FORMATS", "ReasoningFormat", "ReasoningSplitter", "choose_reasoning"]

Kind = Literal["reasoning", "text"]


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its thinking, which comes first in an answer if at all.

    ``inside``: the answer always begins in the midst of a thought, even if the prompt shows no open mark.
    """

    name: str
    open: str
    close: str
    inside: bool = False

    def begins_inside(self, prompt: str) -> bool:
        """Whether an answer to this rendered prompt begins in the midst of a thought."""
        end = prompt.rstrip()
        return self.inside or end.endswith(self.open)

    def splitter(self, prompt: str) -> ReasoningSplitter:
        """For one answer to the rendered prompt."""
        return ReasoningSplitter(self, self.begins_inside(prompt))


REASONING_FORMATS = {
    one.name: one
    for one in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("think-inside", "<think>", "</think>", inside=True),
        ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
    )
}
_NAMES = ("qwen3", "qwq", "deepseek-r1", "deepseek_r1")


def choose_reasoning(name: str | None, *, chat_template: str | None, model: str) -> ReasoningFormat | None:
    """The format named, or the one that the chat template or the model's name shows; None: no splitting.

    Raises:
        ConfigError: no such format.
    """
    if name == "none":
        return None
    if name is not None and name != "auto":
        if name not in REASONING_FORMATS:
            raise ConfigError(f"reasoning_parser={name!r}: allowed is auto, none, {', '.join(REASONING_FORMATS)}.")
        return REASONING_FORMATS[name]
    template = chat_template or ""
    for one in (REASONING_FORMATS["think"], REASONING_FORMATS["magistral"]):
        if one.open in template or one.close in template:
            return one
    return REASONING_FORMATS["think"] if any(word in model.lower() for word in _NAMES) else None


class ReasoningSplitter:
    """One answer's text, in pieces of thinking and of answer. A mark is never shown, nor any part of one."""

    def __init__(self, form: ReasoningFormat, inside: bool) -> None:
        self._form = form
        self._held = ""
        self._fresh = True  # nothing of the present part was given out yet: white space before it goes
        self._state: Literal["before", "reasoning", "text"] = "reasoning" if inside else "before"
        self._may_open = inside  # a model may write the mark again that the prompt ended with

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        """What is certain now of the text so far."""
        self._held += text
        out: list[tuple[Kind, str]] = []
        if self._state == "before" and not self._begin(out):
            return out
        if self._state == "reasoning":
            self._think(out)
        if self._state == "text":
            self._give(out, "text", self._held)
            self._held = ""
        return out

    def finish(self) -> list[tuple[Kind, str]]:
        """What was held back, when no text will follow."""
        out: list[tuple[Kind, str]] = []
        kind: Kind = "reasoning" if self._state == "reasoning" else "text"
        self._give(out, kind, self._held.rstrip() if kind == "reasoning" else self._held)
        self._held = ""
        return out

    def _begin(self, out: list[tuple[Kind, str]]) -> bool:
        """Does the answer begin with a thought? False: not known yet."""
        start = self._held.lstrip()
        mark = self._form.open
        if start.startswith(mark):
            self._held = start[len(mark) :]
            self._state = "reasoning"
        elif mark.startswith(start):
            return False
        else:
            self._state, self._fresh = "text", False
        return True

    def _think(self, out: list[tuple[Kind, str]]) -> None:
        form = self._form
        if self._may_open:
            start = self._held.lstrip()
            if form.open.startswith(start) and start != form.open:
                return
            self._may_open = False
            if start.startswith(form.open):
                self._held = start[len(form.open) :]
        place = self._held.find(form.close)
        if place >= 0:
            self._give(out, "reasoning", self._held[:place].rstrip())
            self._held = self._held[place + len(form.close) :]
            self._state, self._fresh = "text", True
            return
        keep = held_length(self._held, (form.close,))
        sure = self._held[: len(self._held) - keep].rstrip()  # white space before the closing mark is no thought
        self._give(out, "reasoning", sure)
        self._held = self._held[len(sure) :]

    def _give(self, out: list[tuple[Kind, str]], kind: Kind, text: str) -> None:
        if self._fresh:
            text = text.lstrip()
        if text:
            self._fresh = False
            out.append((kind, text))
