"""Random weights of a config's shapes, for measuring and testing without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from dougong.models.weights import ALL, WeightSource, WeightSpec

__all__ = ["DummyWeights"]


class DummyWeights(WeightSource):
    """Each tensor is drawn on the device from a seed of its own (``seed`` and its name), so every rank that asks for a
    part of it gets a part of the same tensor."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, seed: int = 0, deviation: float = 0.02) -> None:
        self.description = f"random weights (seed {seed})"
        self.seed = seed
        self._device, self._dtype, self._deviation = device, dtype, deviation

    def shapes(self) -> Mapping[str, Sequence[int]]:
        return {}

    def check(self, wanted: Iterable[WeightSpec], ignored: Iterable[str] = ()) -> None:
        return None

    def read(self, spec: WeightSpec, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        if spec.init == "normal":
            generator = torch.Generator(self._device)
            # Some generators look at the low 32 bits only.
            generator.manual_seed(zlib.crc32(f"{self.seed}:{spec.name}".encode()))
            full = torch.empty(spec.shape, dtype=self._dtype, device=self._device)
            full.normal_(0.0, self._deviation, generator=generator)
        else:
            full = torch.full(spec.shape, float(spec.init == "one"), dtype=self._dtype, device=self._device)
        full = full[rows]
        return full if columns == ALL else full[:, columns]
