"""Token embedding and LM head, divided over ranks by vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dougong.models.build import Builder
from dougong.models.layers.linear import Linear, Piece, own
from dougong.models.weights import WeightSource, WeightSpec

__all__ = ["Embedding", "LMHead"]


class Embedding:
    """ids [T] int64 -> [T, E]. Each rank holds a stretch of the vocabulary; other ids give zeros, the sum is whole."""

    def __init__(self, build: Builder, name: str, *, scale: float | None = None) -> None:
        config = build.config
        self.spec = WeightSpec(f"{name}.weight", (config.vocab_size, config.hidden_size))
        self.part = _vocabulary_part(build)
        self._device, self._dtype = build.device, build.dtype
        self._all_reduce = build.collectives.all_reduce if build.size > 1 else None
        # Rounded to the model's dtype, as Gemma's own code does.
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=build.dtype))
        self.weight: torch.Tensor = torch.empty(0)

    def weights(self) -> Iterator[WeightSpec]:
        yield self.spec

    def load(self, source: WeightSource) -> None:
        self.weight = own(source.read(self.spec, self.part), self._device, self._dtype)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._all_reduce is None:
            x = F.embedding(ids, self.weight)
        else:
            local = ids - self.part.start
            mine = (local >= 0) & (local < self.weight.shape[0])
            x = F.embedding(torch.where(mine, local, 0), self.weight)
            x = self._all_reduce(x.masked_fill_(~mine[:, None], 0))
        return x if self._scale is None else x.mul_(self._scale)


class LMHead(Linear):
    """hidden [R, E] -> logits [R, V] on every rank. Tied: its matrix is the embedding's."""

    def __init__(self, build: Builder, name: str, *, bias: bool = False, tied: Embedding | None = None) -> None:
        config = build.config
        shape = (config.vocab_size, config.hidden_size)
        part = _vocabulary_part(build)
        piece = Piece(
            tied.spec if tied is not None else WeightSpec(f"{name}.weight", shape),
            WeightSpec(f"{name}.bias", shape[:1], "zero") if bias else None,
            part,
        )
        self._width = -(-config.vocab_size // build.size)
        super().__init__(build, [piece], config.hidden_size, self._width, format=build.weight_format.head)
        self.vocab_size = config.vocab_size
        self._gather = build.collectives.all_gather if build.size > 1 else None
        self._tied = tied

    def load(self, source: WeightSource) -> None:
        super().load(source)
        if self.bias is not None:
            self.bias = F.pad(self.bias, (0, self._width - self.bias.shape[0]))

    def _dense(self, source: WeightSource) -> torch.Tensor:
        # A dense tied head may share the embedding's memory; anything else is packed from the file's own values.
        if self._tied is not None and self.kernel.query.format == "dense":
            weight = self._tied.weight
        else:
            weight = super()._dense(source)
        short = self._width - weight.shape[0]
        return F.pad(weight, (0, 0, 0, short)) if short else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.kernel.apply(x, self.packed, self.bias)
        return y if self._gather is None else self._gather(y, dim=-1)[..., : self.vocab_size]


def _vocabulary_part(build: Builder) -> slice:
    """This rank's rows; the last ranks may have fewer, or none, and pad."""
    total = build.config.vocab_size
    width = -(-total // build.size)
    return slice(min(build.rank * width, total), min((build.rank + 1) * width, total))
