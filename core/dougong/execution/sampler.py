"""Choosing tokens: all rows at once, on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from dougong.execution.logprobs import LogprobTensors, RawLogits
from dougong.execution.sampling_state import SamplingRows, SamplingState
from dougong.hal import OpTable

__all__ = ["BLOCKED_ROW", "NAN_ROW", "Sampled", "Sampler"]

#: In place of a token id: the row's logits held NaN; the options left no token to choose.
NAN_ROW, BLOCKED_ROW = -1, -2


class Sampled:
    """One step's choice. ``tokens`` [R] int64 on the device, NAN_ROW or BLOCKED_ROW where there is none.

    ``logprobs``: tensors of the rows ``logprob_rows``, which asked for ``logprob_counts`` alternatives.
    """

    __slots__ = ("logprob_counts", "logprob_rows", "logprobs", "tokens")

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.logprobs: LogprobTensors | None = None
        self.logprob_rows: list[int] = []
        self.logprob_counts: list[int] = []


class Sampler:
    """Applies every slot's options to its row's logits and draws.

    The order is vLLM's: allowed tokens and biases, bad words, tokens held back by ``min_tokens``, penalties,
    temperature, top-k, top-p, min-p. Log-probabilities are those of the raw logits. What depends on earlier tokens
    (counts, bad words) is kept on the device and brought up to date with each sampled token there, so that the next
    step need not wait for the host to know it.

    Args:
        ops: ``ops.argmax`` and ``ops.sample`` choose.
        last_token: [slots + 1] int64 on the device; the sampled ids are stored there.
    """

    def __init__(self, ops: OpTable, state: SamplingState, last_token: torch.Tensor) -> None:
        self.state = state
        self._argmax: Callable[[torch.Tensor], torch.Tensor] = ops.argmax
        self._draw: Callable[..., torch.Tensor] = ops.sample
        self._last_token = last_token

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        host_slots: npt.NDArray[np.int64],
        host_positions: npt.NDArray[np.int64],
        *,
        allowed: torch.Tensor | None = None,
    ) -> Sampled:
        """Choose a token for each row.

        Args:
            logits: [R, V] in the model's dtype; may be changed.
            slots, positions: [R] int64, device: the rows' slots, and where their new tokens will stand.
            host_slots, host_positions: the same on the host.
            allowed: [G, V] bool, False where a grammar forbids a token, for the rows that a grammar guides, in their
                order (all rows if G is R); None without grammars.
        """
        if self.state.plain and allowed is None:
            sampled = Sampled(self._greedy(logits))
        else:
            sampled = self._full(logits, positions, host_slots, host_positions, allowed)
        self._last_token.index_copy_(0, slots, sampled.tokens.clamp_min(0))
        return sampled

    def _greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """The arg max, the lowest id among equals. NaN counts as the largest, so one look at the winner finds it."""
        tokens = self._argmax(logits)
        best = logits.gather(-1, tokens[:, None])[:, 0]
        return tokens.masked_fill_(best != best, NAN_ROW)

    def _full(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        host_slots: npt.NDArray[np.int64],
        host_positions: npt.NDArray[np.int64],
        allowed: torch.Tensor | None,
    ) -> Sampled:
        state = self.state
        rows = state.rows(host_slots)
        raw = None
        if rows.logprob_index is not None:
            counts = rows.logprob_counts
            raw = RawLogits(logits.index_select(0, rows.logprob_index), -1 if min(counts) < 0 else max(counts))
        x = logits.float()
        top = x.amax(-1)
        broken = top != top
        blocked = self._shape(x, rows, host_positions, allowed)
        if rows.all_greedy:
            tokens = self._argmax(x)
        else:
            tokens = self._draw(x, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, positions)
        if blocked is not None:
            tokens = tokens.masked_fill(blocked, BLOCKED_ROW)
        tokens = tokens.masked_fill(broken, NAN_ROW)
        sampled = Sampled(tokens)
        if rows.count_rows is not None or rows.word_check is not None or raw is not None:
            real = tokens.clamp_min(0)
            self._remember(rows, real)
            if raw is not None:
                sampled.logprobs = raw.of(real.index_select(0, rows.logprob_index))  # type: ignore[arg-type]
                sampled.logprob_rows, sampled.logprob_counts = rows.logprob_rows, rows.logprob_counts
        return sampled

    def _shape(
        self,
        x: torch.Tensor,
        rows: SamplingRows,
        host_positions: npt.NDArray[np.int64],
        allowed: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Change logits [R, V] float32 in place; returns the rows [R] bool left without a token, if any can be."""
        state = self.state
        masked = rows.masked
        if allowed is not None:
            self._guide(x, rows, allowed)
            masked = True
        if rows.bias_rows is not None:
            assert rows.bias_table is not None
            state.bias.apply(x, rows.bias_rows, rows.bias_table)
        if rows.word_check is not None:
            state.words.apply(x, rows.word_check)
        held = rows.held_ends(state, host_positions) if len(rows.ends_rows) else None
        if held is not None:
            x.index_put_(held, x.new_full((), -torch.inf))
            masked = True
        if rows.count_rows is not None:
            assert rows.count_table is not None and rows.penalties is not None
            state.counts.apply(x, rows.count_rows, rows.count_table, rows.penalties)
        return x.amax(-1) == -torch.inf if masked else None

    @staticmethod
    def _guide(x: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor) -> None:
        """Forbid, in place, what grammars do not allow next."""
        if allowed.shape[0] == x.shape[0]:
            x.masked_fill_(~allowed, -torch.inf)
            return
        assert rows.guided_index is not None
        guided = x.index_select(0, rows.guided_index).masked_fill_(~allowed, -torch.inf)
        x.index_copy_(0, rows.guided_index, guided)

    def _remember(self, rows: SamplingRows, tokens: torch.Tensor) -> None:
        state = self.state
        if rows.count_rows is not None:
            assert rows.count_table is not None
            state.counts.count(rows.count_table, tokens.index_select(0, rows.count_rows))
        if rows.word_check is not None:
            state.words.shift(rows.word_check, tokens)
