"""The weight of an RMS norm; the ops themselves come from the step's table."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dougong.models.build import Builder
from dougong.models.layers.linear import own
from dougong.models.weights import WeightSource, WeightSpec

__all__ = ["RMSNorm"]


class RMSNorm:
    """weight [E] in the model's dtype; the normalised value is multiplied by ``offset + weight``."""

    def __init__(self, build: Builder, name: str, size: int, *, offset: float = 0.0) -> None:
        self.spec = WeightSpec(f"{name}.weight", (size,), "zero" if offset else "one")
        self.eps = build.config.norm_eps
        self.offset = offset
        # Filled in place by load(): QKVShape holds the same tensor.
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)

    def weights(self) -> Iterator[WeightSpec]:
        yield self.spec

    def load(self, source: WeightSource) -> None:
        self.weight.copy_(own(source.read(self.spec), self.weight.device))
