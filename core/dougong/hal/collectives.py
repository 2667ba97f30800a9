"""Communication between the ranks of one model, by default through torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Collectives", "SingleRank"]


class Collectives:
    """All ranks of ``group`` (None: the default one). ``capturable`` says whether calls may stand inside a graph."""

    capturable = False

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; returns ``x``."""
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors (of equal shape) along ``dim``."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks and keep this rank's share of dimension 0, which the number of ranks divides."""
        summed = self.all_reduce(x.clone())
        return summed.chunk(self.size, dim=0)[self.rank]

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Rank ``source``'s tensor to all, in place; returns ``x``."""
        dist.broadcast(x, source, group=self.group)
        return x


class SingleRank(Collectives):
    """One rank: every collective is the identity."""

    capturable = True

    def __init__(self) -> None:
        self.group = None
        self.rank = 0
        self.size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        return x
