"""Vectors of prompts: what of a step's hidden states goes into them."""

from __future__ import annotations

import numpy as np
import torch

from dougong.execution.delta import StepDelta
from dougong.execution.result import StepResult

__all__ = ["PooledVectors"]


class PooledVectors:
    """One step's part of the vectors that its rows ask for; ``tensors`` go to the host with the sampled tokens.

    Args:
        hidden: [T, E], the last norm applied; may be overwritten by the next step.
    """

    def __init__(self, delta: StepDelta, hidden: torch.Tensor) -> None:
        self.tensors: list[torch.Tensor] = []
        self._rows: list[tuple[int, bool]] = []
        if not delta.pooled:
            return
        assert delta.lengths is not None
        ends = np.cumsum(delta.lengths)
        for one in delta.pooled:
            stop = int(ends[one.row])
            start = stop - int(delta.lengths[one.row])
            if one.kind == "mean":
                self._add(one.row, one.first, hidden[start:stop].sum(0, dtype=torch.float32))
            elif one.kind == "cls" and one.first:
                self._add(one.row, True, hidden[start].to(torch.float32, copy=True))
            elif one.kind == "last" and one.last:
                self._add(one.row, True, hidden[stop - 1].to(torch.float32, copy=True))

    def _add(self, row: int, anew: bool, vector: torch.Tensor) -> None:
        self._rows.append((row, anew))
        self.tensors.append(vector)

    def collect(self, result: StepResult, arrived: list[torch.Tensor]) -> None:
        """Put the vectors, as they arrived on the host, into ``result``."""
        for (row, anew), vector in zip(self._rows, arrived, strict=True):
            result.vectors[row] = anew, vector.numpy()
