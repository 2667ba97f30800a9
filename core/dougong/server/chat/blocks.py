"""Events of one choice gathered into blocks (a thought, a text, a tool call), for APIs that stream item by item."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from dougong.server.chat.turn import Done, Event, Finished, ReasoningDelta, Started, TextDelta, ToolCallDelta

__all__ = ["Block", "Closed", "Grown", "Opened", "Part", "in_blocks"]


@dataclass
class Block:
    """``place`` counts an answer's blocks. ``call_id`` and ``name`` are a call's, and its text the arguments' JSON."""

    place: int
    kind: Literal["reasoning", "text", "call"]
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def arguments(self) -> dict[str, Any]:
        """A call's arguments as an object. What is none, since the answer was cut off, stands under INVALID_JSON."""
        try:
            found = json.loads(self.text or "{}")
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"INVALID_JSON": self.text}


@dataclass(frozen=True, slots=True)
class Opened:
    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """``text`` was added to the block, with the log-probabilities of its tokens if they were asked for."""

    block: Block
    text: str
    logprobs: list[Any]


@dataclass(frozen=True, slots=True)
class Closed:
    block: Block


Part = Opened | Grown | Closed | Started | Finished | Done


async def in_blocks(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Part, None]:
    """The events of an answer with one choice. Each block is opened, grows, and is closed before the next."""
    open_block: Block | None = None
    index = -1
    count = 0
    early: list[Any] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, (Started, Done)):
                yield event
                continue
            if isinstance(event, Finished):
                if open_block is not None:
                    yield Closed(open_block)
                    open_block = None
                yield event
                continue
            kind: Literal["reasoning", "text", "call"] = "text"
            if isinstance(event, ReasoningDelta):
                kind = "reasoning"
            elif isinstance(event, ToolCallDelta):
                kind = "call"
            text = event.arguments if isinstance(event, ToolCallDelta) else event.text
            scores = list(event.logprobs or ()) if isinstance(event, TextDelta) else []
            if not text and not scores and kind != "call":
                continue
            other = open_block is None or open_block.kind != kind
            if kind == "text":
                scores = early + scores
                early = []
                if not text and other:
                    early = scores  # of a character's first bytes: they open no block, and go with its text
                    continue
            if other or (isinstance(event, ToolCallDelta) and event.index != index):
                if open_block is not None:
                    yield Closed(open_block)
                open_block = Block(count, kind)
                count += 1
                if isinstance(event, ToolCallDelta):
                    index = event.index
                    open_block.call_id, open_block.name = event.id or "", event.name or ""
                yield Opened(open_block)
            assert open_block is not None
            if text or scores:
                open_block.pieces.append(text)
                open_block.logprobs += scores
                yield Grown(open_block, text, scores)
