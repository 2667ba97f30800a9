"""A grammar without a library: which tokens may follow depends on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class FakeGuide:
    grammar: FakeGrammar
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def complete(self) -> bool:
        return len(self.tokens) >= self.grammar.length


@dataclass
class FakeGrammar:
    """Token t may stand at place i if (t + i) % modulus is 0, and ``length`` tokens are all. ``breaks_at``: it takes
    too much work there."""

    modulus: int = 5
    length: int = 1000
    breaks_at: int = -1
    vocab: int = 97
    started: list[FakeGuide] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    """Where masks were made."""

    def allowed(self, place: int) -> list[int]:
        return [token for token in range(self.vocab) if (token + place) % self.modulus == 0]

    def start(self, tokens: Sequence[int]) -> FakeGuide:
        guide = FakeGuide(self)
        self.started.append(guide)
        for token in tokens:
            self.accept([guide], [token])
        return guide

    def accept(self, guides: Sequence[Any], tokens: Sequence[int]) -> None:
        for guide, token in zip(guides, tokens, strict=True):
            assert token in guide.grammar.allowed(len(guide.tokens)), "a token that the mask forbade, or out of turn"
            guide.tokens.append(token)

    def fill(self, guides: Sequence[Any], bits: np.ndarray) -> None:
        self.threads.add(threading.current_thread().name)
        for row, guide in zip(bits, guides, strict=True):
            if guide.complete:
                continue
            if len(guide.tokens) == guide.grammar.breaks_at:
                guide.error = "too much work"
                continue
            row[:] = 0
            words = row.view(np.uint32)
            for token in guide.grammar.allowed(len(guide.tokens)):
                words[token // 32] |= np.uint32(1 << (token % 32))
