"""Per-request tables over the vocabulary, on the device: made when a request needs one, reused when it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dougong.execution.transfer import Transfer

__all__ = ["BiasTable", "CountTable", "WordCheck", "WordTable"]

Ints = npt.NDArray[np.int64]


class _Rows:
    """Which table row a slot has. Rows are handed out lowest first, so that a table stays as small as can be."""

    def __init__(self, num_slots: int) -> None:
        self._row = np.full(num_slots, -1, dtype=np.int64)
        self._free: list[int] = []
        self.size = 0

    def rows_of(self, slots: Ints) -> Ints:
        """Table rows of slots that have one."""
        return self._row[slots]

    def take(self, slot: int) -> int:
        """A row for ``slot``; ``size`` grows when none is free."""
        if not self._free:
            grown = max(4, 2 * self.size)
            self._free = list(range(grown - 1, self.size - 1, -1))
            self.size = grown
        row = self._free.pop()
        self._row[slot] = row
        return row

    def release(self, slot: int) -> None:
        if self._row[slot] >= 0:
            self._free.append(int(self._row[slot]))
            self._row[slot] = -1


def _grown(table: torch.Tensor, rows: int) -> torch.Tensor:
    out = table.new_zeros((rows, *table.shape[1:]))
    out[: table.shape[0]] = table
    return out


class BiasTable(_Rows):
    """What is added to a request's logits, [rows, V] float32: its biases, and -inf where a token is not allowed."""

    def __init__(self, transfer: Transfer, num_slots: int, vocab: int) -> None:
        super().__init__(num_slots)
        self._transfer = transfer
        self.table = torch.zeros(0, vocab, dtype=torch.float32, device=transfer.where)

    def admit(self, slot: int, allowed: Sequence[int] | None, bias: Mapping[int, float] | None) -> None:
        row = self.take(slot)
        vocab = self.table.shape[1]
        values = np.zeros(vocab, dtype=np.float32)
        if allowed is not None:
            values[:] = -np.inf
            values[[token for token in allowed if token < vocab]] = 0.0
        for token, amount in (bias or {}).items():
            if token < vocab:
                values[token] += amount
        if self.size > self.table.shape[0]:
            self.table = _grown(self.table, self.size)
        self.table[row].copy_(self._transfer.to_device(values))

    def apply(self, logits: torch.Tensor, rows: torch.Tensor, table_rows: torch.Tensor) -> None:
        """Add to rows of logits [R, V] in place."""
        logits.index_add_(0, rows, self.table.index_select(0, table_rows))


class CountTable(_Rows):
    """How often each token was generated [rows, V] int32, and whether it stands in the prompt [rows, V] bool."""

    def __init__(self, transfer: Transfer, num_slots: int, vocab: int) -> None:
        super().__init__(num_slots)
        self._transfer = transfer
        self._vocab = vocab
        self.output = torch.zeros(0, vocab, dtype=torch.int32, device=transfer.where)
        self.prompt = torch.zeros(0, vocab, dtype=torch.bool, device=transfer.where)

    def admit(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        row = self.take(slot)
        if self.size > self.output.shape[0]:
            self.output, self.prompt = _grown(self.output, self.size), _grown(self.prompt, self.size)
        self.output[row].zero_()
        self.prompt[row].zero_()
        up = self._transfer.to_device
        seen = np.unique(np.array([token for token in prompt if token < self._vocab], dtype=np.int64))
        self.prompt[row].index_fill_(0, up(seen), True)
        if output:
            tokens, counts = np.unique(np.array(output, dtype=np.int64), return_counts=True)
            self.output[row].index_copy_(0, up(tokens), up(counts.astype(np.int32)))

    def apply(
        self, logits: torch.Tensor, rows: torch.Tensor, table_rows: torch.Tensor, penalties: torch.Tensor
    ) -> None:
        """Penalise rows of logits [R, V] float32 in place; ``penalties`` [3, rows, 1]: repetition, presence, frequency.

        A repeated token's logit is divided by the repetition penalty where positive and multiplied where negative
        (Keskar et al. 2019; prompt and output count); presence and frequency count the output alone, as OpenAI's do.
        """
        counts = self.output.index_select(0, table_rows)
        generated = counts > 0
        seen = generated | self.prompt.index_select(0, table_rows)
        x = logits.index_select(0, rows)
        repetition, presence, frequency = penalties[0], penalties[1], penalties[2]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= frequency * counts
        x -= presence * generated
        logits.index_copy_(0, rows, x)

    def count(self, table_rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count one more token [rows] int64 per row."""
        places = table_rows * self._vocab + tokens
        self.output.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))


class WordCheck:
    """The bad words of some sampled rows: ``last`` [W] must not follow ``prefix`` [W, M] in row ``rows`` [W].

    Prefixes are aligned to the right; -2 fits any token.
    """

    __slots__ = ("last", "prefix", "rows", "slots", "tail_rows", "tail_slots")

    def __init__(
        self,
        rows: torch.Tensor,
        slots: torch.Tensor,
        prefix: torch.Tensor,
        last: torch.Tensor,
        tail_rows: torch.Tensor,
        tail_slots: torch.Tensor,
    ) -> None:
        self.rows, self.slots, self.prefix, self.last = rows, slots, prefix, last
        self.tail_rows, self.tail_slots = tail_rows, tail_slots


class WordTable:
    """Bad words by slot, and the last M generated tokens of each slot on the device, [slots, M] int64.

    Only generated tokens count towards a word, as in vLLM.
    """

    def __init__(self, transfer: Transfer, num_slots: int, vocab: int) -> None:
        self._transfer = transfer
        self._vocab = vocab
        self._words: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.tail = torch.full((num_slots, 1), -1, dtype=torch.int64, device=transfer.where)

    def admit(self, slot: int, words: Sequence[Sequence[int]], output: Sequence[int]) -> None:
        self._words[slot] = tuple(tuple(word) for word in words if word[-1] < self._vocab)
        need = max(len(word) for word in words) - 1
        width = self.tail.shape[1]
        if need > width:
            grown = self.tail.new_full((self.tail.shape[0], need), -1)
            grown[:, need - width :] = self.tail
            self.tail, width = grown, need
        last = np.full(width, -1, dtype=np.int64)
        known = output[-width:]
        if known:
            last[-len(known) :] = known
        self.tail[slot].copy_(self._transfer.to_device(last))

    def release(self, slot: int) -> None:
        self._words.pop(slot, None)

    def check(self, rows: Ints, slots: Ints) -> WordCheck:
        """The words of sampled rows ``rows`` [n] in ``slots`` [n]."""
        width = self.tail.shape[1]
        words = [(row, slot, word) for row, slot in zip(rows.tolist(), slots.tolist()) for word in self._words[slot]]
        prefix = np.full((len(words), width), -2, dtype=np.int64)
        for i, (_, _, word) in enumerate(words):
            if len(word) > 1:
                prefix[i, width - len(word) + 1 :] = word[:-1]
        up = self._transfer.to_device
        return WordCheck(
            up(np.array([row for row, _, _ in words], dtype=np.int64)),
            up(np.array([slot for _, slot, _ in words], dtype=np.int64)),
            up(prefix),
            up(np.array([word[-1] for _, _, word in words], dtype=np.int64)),
            up(rows.copy()),
            up(slots.copy()),
        )

    def apply(self, logits: torch.Tensor, check: WordCheck) -> None:
        """Set the last token of each word that would be completed to -inf, in place."""
        tail = self.tail.index_select(0, check.slots)
        fits = ((tail == check.prefix) | (check.prefix == -2)).all(-1)
        amount = torch.zeros_like(fits, dtype=logits.dtype).masked_fill_(fits, -torch.inf)
        logits.index_put_((check.rows, check.last), amount, accumulate=True)

    def shift(self, check: WordCheck, tokens: torch.Tensor) -> None:
        """Take the sampled tokens [R] of the rows into their slots' history."""
        tail = self.tail.index_select(0, check.tail_slots)
        new = torch.cat((tail[:, 1:], tokens.index_select(0, check.tail_rows)[:, None]), dim=1)
        self.tail.index_copy_(0, check.tail_slots, new)
