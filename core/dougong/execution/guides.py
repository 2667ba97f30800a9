"""Grammars at work: which tokens each guided row may choose next, found while the device computes the step.

A step's forward needs no mask, only its sampling does. So guided requests are scheduled ahead like all others, and a
row's mask is made between the two: where the sampled tokens lie on the host at once, on other threads during the
forward; elsewhere right after the forward was enqueued, while the device is at it.

Nothing here knows a grammar library: `dougong.engine.grammars` brings what is used through these protocols.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dougong.errors import EngineError
from dougong.execution.parallel import Ranks
from dougong.execution.result import PendingStep, StepResult
from dougong.execution.sampling_state import SamplingState
from dougong.execution.transfer import Transfer
from dougong.scheduling import StepPlan

__all__ = ["Grammar", "Guide", "Guides", "StepGuides"]

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.int32]


class Guide(Protocol):
    """How far one completion has come in its grammar."""

    @property
    def complete(self) -> bool:
        """Nothing may follow any more."""

    @property
    def error(self) -> str:
        """Why it cannot go on ('' while it can), such as a grammar that takes too much work."""


class Grammar(Protocol):
    """What a structured output was compiled into. `accept` and `fill` take guides of any grammar of one compiler and
    let other Python threads run meanwhile."""

    def start(self, tokens: Sequence[int]) -> Guide:
        """A completion that has these tokens already."""

    def accept(self, guides: Sequence[Guide], tokens: Sequence[int]) -> None:
        """Go on by one token each."""

    def fill(self, guides: Sequence[Guide], bits: Bits) -> None:
        """Write each guide's row of ``bits`` [guides, ceil(V / 32)]: bit t % 32 of word t // 32 set where token t may
        come next. Rows of guides that are complete or have failed stay as they are."""


class Guides:
    """The guides of all slots.

    Only rank 0 has them: it alone knows the sampled tokens on the host, and sends its masks to the others.
    """

    def __init__(self, transfer: Transfer, vocab: int, ranks: Ranks) -> None:
        self.transfer = transfer
        self.vocab = vocab
        self.ranks = ranks
        self._by_slot: dict[int, tuple[Grammar, Guide]] = {}
        self._unread: deque[PendingStep] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._powers: torch.Tensor | None = None

    def follow(self, plan: StepPlan) -> None:
        """Take over what the plan changes. A request that comes back after a preemption has all its tokens by now."""
        for slot in plan.released:
            self._by_slot.pop(slot, None)
        for request in plan.admitted:
            grammar: Grammar | None = request.grammar  # type: ignore[assignment]
            if grammar is not None:
                self._by_slot[request.batch_index] = grammar, grammar.start(request.output_token_ids)

    def begin(self, state: SamplingState, slots: Ints) -> StepGuides | None:
        """Called when a step's forward is about to start, with the slots [R] of its sampled rows; None: none of them
        is guided."""
        rows = state.rows(slots).guided_rows
        if not rows:
            return None
        return StepGuides(self, rows, [self._by_slot[int(slots[row])] for row in rows] if self.ranks.rank == 0 else [])

    def launched(self, pending: PendingStep) -> None:
        """A step with guided rows is on its way: its tokens come before any later mask."""
        if self.ranks.rank == 0:
            self._unread.append(pending)

    def read(self) -> None:
        """Wait for the steps before, which brings their guides up to date."""
        while self._unread:
            self._unread.popleft().result()

    def submit(self, step: StepGuides) -> Future[Bits]:
        """Make a step's masks on another thread."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "dougong-masks")
        return self._thread.submit(step.make)

    def expand(self, bits: Bits) -> torch.Tensor:
        """[G, words] int32 on the host to [G, V] bool on the device."""
        if self._powers is None:
            self._powers = self.transfer.to_device(np.left_shift(1, np.arange(8)).astype(np.uint8))
        packed = self.transfer.to_device(bits.view(np.uint8))
        return packed.unsqueeze(-1).bitwise_and(self._powers).ne(0).flatten(1)[:, : self.vocab]

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._by_slot.clear()
        self._unread.clear()


class StepGuides:
    """One step's guided rows.

    Args:
        rows: of the sampled rows, those that are guided, ascending.
        entries: their grammars and guides; none on ranks other than 0.
    """

    def __init__(self, guides: Guides, rows: list[int], entries: list[tuple[Grammar, Guide]]) -> None:
        self._guides = guides
        self._rows = rows
        self._entries = entries
        self._coming: Future[Bits] | None = None
        if guides.ranks.rank == 0 and guides.transfer.on_host:
            guides.read()
            self._coming = guides.submit(self)

    def make(self) -> Bits:
        """The masks, [guided rows, words]; all tokens are allowed where a guide has come to its end."""
        bits = np.full((len(self._rows), -(-self._guides.vocab // 32)), -1, dtype=np.int32)
        grammar = self._entries[0][0]
        grammar.fill([guide for _, guide in self._entries], bits)
        for row, (_, guide) in zip(bits, self._entries):
            if guide.error:
                row[:] = -1  # what is sampled does not count: `take` ends the request
        return bits

    def allowed(self) -> torch.Tensor:
        """The masks on the device, [guided rows, V] bool. Called once, when the forward is enqueued."""
        ranks = self._guides.ranks
        if ranks.rank != 0:
            return self._guides.expand(ranks.receive())
        try:
            if self._coming is None:
                self._guides.read()
            bits = self.make() if self._coming is None else self._coming.result()
        except BaseException:
            if not ranks.alone:  # they wait for masks, whatever happened here
                ranks.send(np.full((len(self._rows), -(-self._guides.vocab // 32)), -1, dtype=np.int32))
            raise
        if not ranks.alone:
            ranks.send(bits)
        return self._guides.expand(bits)

    def take(self, result: StepResult, sample_rows: Ints | None) -> None:
        """Bring the guides up to date with the step's tokens, and report those that ended.

        Args:
            sample_rows: the plan's rows that sampled; None: all.
        """
        guides: list[Guide] = []
        tokens: list[int] = []
        places: list[int] = []
        for index, (_, guide) in zip(self._rows, self._entries):
            row = index if sample_rows is None else int(sample_rows[index])
            token = result.tokens[row]
            if guide.error and token is not None:
                result.errors[row] = EngineError(f"the structured output cannot go on: {guide.error}")
                result.tokens[row] = None
                result.logprobs.pop(row, None)
            elif token is not None and not guide.complete:
                guides.append(guide)
                tokens.append(token)
                places.append(row)
        if not guides:
            return
        self._entries[0][0].accept(guides, tokens)
        result.complete = [row for row, guide in zip(places, guides) if guide.complete]
