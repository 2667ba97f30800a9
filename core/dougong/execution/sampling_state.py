"""Sampling options of every slot, on host and device, brought up to date only where a request comes or goes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dougong.execution.delta import SlotInit
from dougong.execution.token_tables import BiasTable, CountTable, WordTable
from dougong.execution.transfer import Transfer

__all__ = ["SamplingRows", "SamplingState"]

Ints = npt.NDArray[np.int64]

# Rows of the float parameters, and of the integer ones.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
TOP_K, SEED = range(2)

#: Greedy, and nothing else.
_NEUTRAL = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=np.float32)

NO_LOGPROBS = -2
#: Tokens that no request has.
_NEVER = 1 << 40


class SamplingRows:
    """The options of one set of sampled rows, gathered on the device; kept while the rows stay the same.

    Tensors are [R], None where no row uses the option. ``*_rows`` name sampled rows on the device, ``*_table`` their
    rows in a table.
    """

    def __init__(self, state: SamplingState, slots: Ints) -> None:
        self.slots = slots
        self.version = state.version
        up = state.transfer.to_device
        kinds = state.kinds[slots]
        self.all_greedy = bool(state.greedy[slots].all())
        self.logprob_rows: list[int] = []
        self.logprob_counts: list[int] = []
        self.logprob_index: torch.Tensor | None = None
        index = up(slots.copy())
        floats = state.device_floats().index_select(1, index)
        integers = state.device_integers().index_select(1, index)
        self.temperature = floats[TEMPERATURE]
        self.top_k = integers[TOP_K] if (state.integers[TOP_K, slots] > 0).any() else None
        self.top_p = floats[TOP_P] if (state.floats[TOP_P, slots] < 1).any() else None
        self.min_p = floats[MIN_P] if (state.floats[MIN_P, slots] > 0).any() else None
        self.seeds = integers[SEED]

        def chosen(kind: int) -> Ints:
            return np.flatnonzero(kinds & kind)

        self.bias_rows = self.bias_table = None
        self.count_rows = self.count_table = self.penalties = None
        self.word_check = None
        rows = chosen(BIAS)
        if len(rows):
            self.bias_rows, self.bias_table = up(rows), up(state.bias.rows_of(slots[rows]))
        rows = chosen(COUNTS)
        if len(rows):
            self.count_rows, self.count_table = up(rows), up(state.counts.rows_of(slots[rows]))
            self.penalties = floats.index_select(1, self.count_rows)[REPETITION:, :, None]
        rows = chosen(WORDS)
        if len(rows):
            self.word_check = state.words.check(rows, slots[rows])
        self.masked = self.bias_rows is not None or self.word_check is not None
        rows = chosen(LOGPROBS)
        if len(rows):
            self.logprob_rows = rows.tolist()
            self.logprob_counts = state.logprobs[slots[rows]].tolist()
            self.logprob_index = up(rows)
        self.ends_rows = chosen(ENDS)
        #: Rows that a grammar guides, on the host and, unless all are, on the device.
        self.guided_rows: list[int] = chosen(GUIDED).tolist()
        partly = 0 < len(self.guided_rows) < len(slots)
        self.guided_index = up(chosen(GUIDED)) if partly else None
        self._ends: tuple[bytes, torch.Tensor, torch.Tensor] | None = None

    def held_ends(self, state: SamplingState, positions: Ints) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(rows, token ids) that ``min_tokens`` holds back, where the new tokens stand at ``positions`` [R]."""
        rows = self.ends_rows
        active = rows[positions[rows] < state.end_after[self.slots[rows]]]
        if not len(active):
            return None
        key = active.tobytes()
        if self._ends is None or self._ends[0] != key:
            ids = [state.end_ids[int(self.slots[row])] for row in active]
            flat = np.array([token for one in ids for token in one], dtype=np.int64)
            spread = np.repeat(active, [len(one) for one in ids])
            self._ends = key, state.transfer.to_device(spread), state.transfer.to_device(flat)
        return self._ends[1], self._ends[2]


# What a slot needs beyond an arg max, as bits of ``SamplingState.kinds``.
BIAS, COUNTS, WORDS, LOGPROBS, ENDS, RANDOM, GUIDED = (1 << i for i in range(7))


class SamplingState:
    """Options by slot.

    Args:
        num_slots: seats of the persistent batch.
        vocab: width of the logits.
    """

    def __init__(self, transfer: Transfer, num_slots: int, vocab: int) -> None:
        self.transfer = transfer
        self.vocab = vocab
        self.version = 0
        self.floats = np.tile(_NEUTRAL[:, None], (1, num_slots))
        self.integers = np.zeros((2, num_slots), dtype=np.int64)
        self.kinds = np.zeros(num_slots, dtype=np.int64)
        self.greedy = np.ones(num_slots, dtype=bool)
        self.logprobs = np.full(num_slots, NO_LOGPROBS, dtype=np.int64)
        self.prompt_logprobs = np.full(num_slots, NO_LOGPROBS, dtype=np.int64)
        self.end_after = np.zeros(num_slots, dtype=np.int64)
        self.end_ids: dict[int, tuple[int, ...]] = {}
        self.bias = BiasTable(transfer, num_slots, vocab)
        self.counts = CountTable(transfer, num_slots, vocab)
        self.words = WordTable(transfer, num_slots, vocab)
        self._special: set[int] = set()
        self._guided: set[int] = set()
        self._on_device: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._rows: SamplingRows | None = None

    @property
    def plain(self) -> bool:
        """Whether every slot takes the arg max of its logits and nothing else is asked."""
        return not self._special

    @property
    def guided(self) -> bool:
        """Whether a grammar guides any slot."""
        return bool(self._guided)

    def release(self, slot: int) -> None:
        """A request gave its slot back."""
        self._guided.discard(slot)
        if slot in self._special:
            self._special.discard(slot)
            self.bias.release(slot)
            self.counts.release(slot)
            self.words.release(slot)
            self.end_ids.pop(slot, None)
            self.kinds[slot] = 0
            self.greedy[slot] = True
            self.floats[:, slot] = _NEUTRAL
            self.integers[:, slot] = 0
            self.version += 1
        self.prompt_logprobs[slot] = NO_LOGPROBS

    def admit(self, init: SlotInit) -> None:
        """A request takes a slot; the slot's history on the device begins with the tokens known so far."""
        slot, sampling = init.slot, init.sampling
        self.release(slot)
        if sampling.prompt_logprobs is not None:
            self.prompt_logprobs[slot] = sampling.prompt_logprobs
        kind = 0 if sampling.greedy else RANDOM
        end_ids = tuple(token for token in init.end_ids if token < self.vocab)
        if sampling.allowed_token_ids is not None or sampling.logit_bias:
            kind |= BIAS
            self.bias.admit(slot, sampling.allowed_token_ids, sampling.logit_bias)
        if sampling.has_penalties:
            kind |= COUNTS
            self.counts.admit(slot, init.prompt or [], init.output or [])
        if sampling.bad_words_ids:
            kind |= WORDS
            self.words.admit(slot, sampling.bad_words_ids, init.output or [])
        if sampling.logprobs is not None:
            kind |= LOGPROBS
            self.logprobs[slot] = sampling.logprobs
        if sampling.min_tokens and end_ids:
            kind |= ENDS
            self.end_ids[slot] = end_ids
            self.end_after[slot] = init.prompt_len + min(sampling.min_tokens, _NEVER)  # any integer is allowed
        if sampling.structured is not None:
            kind |= GUIDED
            self._guided.add(slot)
        if not kind:
            return
        greedy = sampling.greedy
        self.floats[:, slot] = (
            0.0 if greedy else sampling.temperature,
            1.0 if greedy else sampling.top_p,
            0.0 if greedy else sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        top_k = 0 if greedy or sampling.top_k >= self.vocab else max(0, sampling.top_k)
        self.integers[:, slot] = top_k, init.seed
        self.kinds[slot] = kind
        self.greedy[slot] = greedy
        self._special.add(slot)
        self.version += 1

    def rows(self, slots: Ints) -> SamplingRows:
        """The gathered options of sampled rows in these slots."""
        rows = self._rows
        if rows is None or rows.version != self.version or not np.array_equal(rows.slots, slots):
            rows = self._rows = SamplingRows(self, slots.copy())
        return rows

    def device_floats(self) -> torch.Tensor:
        """[6, slots] float32 on the device."""
        return self._upload()[1]

    def device_integers(self) -> torch.Tensor:
        """[2, slots] int64 on the device."""
        return self._upload()[2]

    def _upload(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        kept = self._on_device
        if kept is None or kept[0] != self.version:
            up = self.transfer.to_device
            kept = self._on_device = self.version, up(self.floats.copy()), up(self.integers.copy())
        return kept
