"""What a step changes, as bare arrays: read from the scheduler's plan once, and sent to the other ranks.

From here on nothing looks at a `Request` any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dougong.scheduling import Request, StepPlan
from dougong.types import SamplingParams

__all__ = ["BlockChanges", "DeltaReader", "PooledRow", "SlotInit", "StepDelta", "request_seed"]

Ints = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class SlotInit:
    """A request that takes a slot of the persistent batch."""

    slot: int
    request_id: str
    sampling: SamplingParams
    seed: int
    """int64: what its random numbers come from."""
    prompt_len: int
    end_ids: tuple[int, ...]
    """Token ids that end it, which ``min_tokens`` holds back."""
    prompt: list[int] | None = None
    """Its prompt and output so far, only where the sampler looks at them."""
    output: list[int] | None = None


@dataclass(slots=True)
class BlockChanges:
    """Block-table entries that change in one group: ``table[rows[i], columns[i]] = blocks[i]``, all [U] int64."""

    rows: Ints
    columns: Ints
    blocks: Ints


@dataclass(slots=True)
class PooledRow:
    """A row whose request wants a vector of its prompt's hidden states: what this step adds to it."""

    row: int
    kind: str
    """``last``, ``mean`` or ``cls``."""
    first: bool
    """The step computes the prompt's first token."""
    last: bool
    """The step computes the prompt's last token."""


@dataclass(slots=True)
class StepDelta:
    """One step. Rows as in the plan: decodes first.

    ``same_rows``: the rows of the step before, each one position further; ``slots`` and the rest are then None.
    ``token_ids`` [T] int64: ``-1 - slot`` stands for the token that lies on the device for that slot.
    """

    index: int
    num_rows: int
    num_decode_rows: int
    num_tokens: int
    same_rows: bool
    slots: Ints | None
    starts: Ints | None
    lengths: Ints | None
    """Tokens computed per row, [B]."""
    token_ids: Ints | None
    sample_rows: Ints | None
    """Rows that sample, ascending."""
    admitted: list[SlotInit] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    changes: list[BlockChanges | None] = field(default_factory=list)
    """Per KV group."""
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    prompt_targets: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(row, first of its tokens in this step, the prompt tokens that follow from there on), for rows that want prompt
    logprobs and have not given these yet."""
    pooled: list[PooledRow] = field(default_factory=list)


def request_seed(request: Request, engine_seed: int) -> int:
    """The seed of a request's random numbers, int64.

    With a seed of its own it is that, and siblings that were all given the same one are kept apart; without, it depends
    on the engine's seed and the request's id.
    """
    own = request.sampling.seed
    if own is None:
        digest = hashlib.blake2b(f"{engine_seed}/{request.request_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
    first = request.parent
    sibling = 0 if first is None or first.sampling.seed != own else first.children.index(request) + 1
    mixed = (own + sibling * 0x9E3779B97F4A7C15) & _MASK
    return mixed - (1 << 64) if mixed >> 63 else mixed


class DeltaReader:
    """Turns plans into deltas. Knows which token the device holds for each slot.

    Args:
        num_slots: seats of the persistent batch.
        num_groups: KV groups.
        seed: the engine's seed, for requests that bring none.
    """

    def __init__(self, num_slots: int, num_groups: int, seed: int) -> None:
        self.num_groups = num_groups
        self.seed = seed
        self._token_at = np.full(num_slots, -1, dtype=np.int64)  # position of the token on the device
        self._last: tuple[int, Ints, Ints] | None = None  # (plan index, slots, positions to come)
        self._told: dict[Request, int] = {}  # prompt positions whose logprobs were given, by request that wants them

    def read(self, plan: StepPlan) -> StepDelta:
        """The plan as arrays. Called right after `Scheduler.schedule`, once per plan, in order."""
        admitted = [self._admit(request) for request in plan.admitted]
        rows = len(plan.requests)
        changes = self._changes(plan.new_blocks) if plan.new_blocks else []
        copies = [(copy[0], copy[1], copy[2]) for copy in plan.copies]
        last = self._last
        if not plan.rows_changed and last is not None and last[0] == plan.index - 1 and not admitted:
            slots, positions = last[1], last[2]
            if bool((self._token_at[slots] == positions).all()):
                following = positions + 1
                self._token_at[slots] = following
                self._last = (plan.index, slots, following)
                return StepDelta(
                    plan.index, rows, rows, rows, True, None, None, None, None, None,
                    released=plan.released, changes=changes, copies=copies,
                )  # fmt: skip
        return self._read_all(plan, admitted, changes, copies)

    def _read_all(
        self,
        plan: StepPlan,
        admitted: list[SlotInit],
        changes: list[BlockChanges | None],
        copies: list[tuple[int, int, int]],
    ) -> StepDelta:
        requests, decodes = plan.requests, plan.num_decode_rows
        rows = len(requests)
        slots = np.array([request.batch_index for request in requests], dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int64)
        lengths = np.array(plan.num_tokens, dtype=np.int64)
        token_ids = np.empty(plan.total_tokens, dtype=np.int64)
        if decodes:
            np.subtract(-1, slots[:decodes], out=token_ids[:decodes])
            elsewhere = np.flatnonzero(self._token_at[slots[:decodes]] != starts[:decodes])
            for row in elsewhere.tolist():
                token_ids[row] = requests[row].token_slice(plan.starts[row], plan.starts[row] + 1)[0]
        place = decodes
        targets: list[tuple[int, int, list[int]]] = []
        pooled: list[PooledRow] = []
        for row in range(rows):
            request = requests[row]
            if row >= decodes:
                start, length = plan.starts[row], plan.num_tokens[row]
                token_ids[place : place + length] = request.token_slice(start, start + length)
                place += length
            if request.sampling.prompt_logprobs is not None and request.parent is None:
                self._add_targets(targets, row, request, plan.starts[row], plan.num_tokens[row])
            kind = request.sampling.pooling
            if kind is not None:
                last = plan.starts[row] + plan.num_tokens[row] == len(request.prompt_token_ids)
                pooled.append(PooledRow(row, kind, plan.starts[row] == 0, last))
        sample_rows = np.flatnonzero(np.array(plan.samples, dtype=bool))
        after = starts + lengths
        self._token_at[slots[sample_rows]] = after[sample_rows]
        simple = decodes == rows and not targets
        self._last = (plan.index, slots, after) if simple else None
        return StepDelta(
            plan.index, rows, decodes, plan.total_tokens, False, slots, starts, lengths, token_ids, sample_rows,
            admitted, plan.released, changes, copies, targets, pooled,
        )  # fmt: skip

    def _add_targets(
        self, targets: list[tuple[int, int, list[int]]], row: int, request: Request, start: int, count: int
    ) -> None:
        """Prompt tokens that follow positions ``start`` … of a row, without those told before a preemption."""
        prompt = request.prompt_token_ids
        stop = min(start + count + 1, len(prompt))
        if request not in self._told:
            self._told = {other: told for other, told in self._told.items() if not other.is_finished}
        first = max(start + 1, self._told.get(request, 0))
        if first < stop:
            targets.append((row, first - 1 - start, prompt[first:stop]))
            self._told[request] = stop

    def _admit(self, request: Request) -> SlotInit:
        sampling = request.sampling
        slot = request.batch_index
        self._token_at[slot] = -1
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= request.eos_token_ids
        history = sampling.has_penalties or bool(sampling.bad_words_ids)
        return SlotInit(
            slot=slot,
            request_id=request.request_id,
            sampling=sampling,
            seed=request_seed(request, self.seed),
            prompt_len=len(request.prompt_token_ids),
            end_ids=tuple(sorted(ends)),
            prompt=list(request.prompt_token_ids) if history else None,
            output=list(request.output_token_ids) if history else None,
        )

    def _changes(self, updates: Sequence[tuple[int, int, int, list[int]]]) -> list[BlockChanges | None]:
        per_group: list[BlockChanges | None] = []
        for group in range(self.num_groups):
            mine = updates if self.num_groups == 1 else [update for update in updates if update[1] == group]
            per_group.append(_flatten(mine) if mine else None)
        return per_group


def _flatten(updates: Sequence[tuple[int, int, int, list[int]]]) -> BlockChanges:
    counts = [len(update[3]) for update in updates]
    rows = np.array([update[0] for update in updates], dtype=np.int64)
    columns = np.array([update[2] for update in updates], dtype=np.int64)
    if max(counts) == 1:
        blocks = np.array([update[3][0] for update in updates if update[3]], dtype=np.int64)
        if len(blocks) == len(updates):
            return BlockChanges(rows, columns, blocks)
    counted = np.array(counts, dtype=np.int64)
    blocks = np.array([block for update in updates for block in update[3]], dtype=np.int64)
    offsets = np.arange(len(blocks), dtype=np.int64) - np.repeat(np.cumsum(counted) - counted, counted)
    return BlockChanges(np.repeat(rows, counted), np.repeat(columns, counted) + offsets, blocks)
