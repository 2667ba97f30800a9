"""Collectives over gloo, which knows only host memory: staged through it, in place on the device."""

from __future__ import annotations

import torch

from dougong.hal import Collectives

__all__ = ["StagedCollectives"]


class StagedCollectives(Collectives):
    """Every call copies to the host and back, so none can stand inside a graph."""

    capturable = False

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(super().all_reduce(x.cpu()))

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return super().all_gather(x.cpu(), dim).to(x.device)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return super().reduce_scatter(x.cpu()).to(x.device)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        return x.copy_(super().broadcast(x.cpu(), source))
