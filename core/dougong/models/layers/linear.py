"""Linear layers divided over ranks: by output rows, by input columns, or several stacked into one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.errors import ConfigError
from dougong.hal import QuantizedWeight
from dougong.models.build import Builder
from dougong.models.quantization import join_rows, slice_weight
from dougong.models.weights import ALL, WeightSource, WeightSpec

__all__ = ["Linear", "Piece", "column_linear", "own", "qkv_linear", "qkv_rows", "row_linear"]


@dataclass(frozen=True)
class Piece:
    """The block ``[rows, columns]`` of a checkpoint's matrix, and the same rows of its bias."""

    weight: WeightSpec
    bias: WeightSpec | None = None
    rows: slice = field(default_factory=lambda: ALL)
    columns: slice = field(default_factory=lambda: ALL)


def own(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``tensor`` on ``device`` in ``dtype``, in memory of its own (not a mapped file's)."""
    moved = tensor.to(device, dtype)
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


class Linear:
    """y [T, O] = x [T, I] · Wᵀ + b, of this rank's part; ``pieces`` are stacked along O.

    A plain object and not an nn.Module: calling it is one Python call into the chosen kernel. ``reduce`` sums over
    the ranks afterwards (a matrix divided by columns).
    """

    def __init__(
        self,
        build: Builder,
        pieces: Sequence[Piece],
        in_features: int,
        out_features: int,
        *,
        format: str | None = None,
        reduce: bool = False,
    ) -> None:
        self.pieces = tuple(pieces)
        self.kernel = build.linear_kernel(in_features, out_features, format or build.weight_format.linear)
        self.packed: Any = None
        self.bias: torch.Tensor | None = None
        self._device = build.device
        self._dtype = build.dtype
        self._all_reduce = build.collectives.all_reduce if reduce and build.size > 1 else None
        # The bias of a product that is summed over the ranks is added by one of them.
        self._adds_bias = self._all_reduce is None or build.rank == 0

    def weights(self) -> Iterator[WeightSpec]:
        for piece in self.pieces:
            yield piece.weight
            if piece.bias is not None:
                yield piece.bias

    def load(self, source: WeightSource) -> None:
        """Read, stack and pack. Blocks that are stored in this layer's format keep their bits."""
        self.pack(self._stored(source) or self._dense(source))
        biases = [piece.bias for piece in self.pieces]
        if self._adds_bias and biases[0] is not None:
            parts = [source.read(one, piece.rows) for one, piece in zip(biases, self.pieces) if one is not None]
            self.bias = own(torch.cat(parts) if len(parts) > 1 else parts[0], self._device, self._dtype)

    def pack(self, weight: torch.Tensor | QuantizedWeight) -> None:
        """Prepare ``weight`` [O, I] for the kernel."""
        self.packed = self.kernel.prepare(weight)

    def _stored(self, source: WeightSource) -> QuantizedWeight | None:
        query = self.kernel.query
        if query.format == "dense":
            return None
        parts = []
        for piece in self.pieces:
            part = source.read_quantized(piece.weight)
            if part is None or part.format != query.format or part.group_size != query.group_size:
                return None
            parts.append(slice_weight(part, piece.rows, piece.columns))
        return join_rows(parts)

    def _dense(self, source: WeightSource) -> torch.Tensor:
        parts = [source.read(piece.weight, piece.rows, piece.columns) for piece in self.pieces]
        if len(parts) == 1:
            return own(parts[0], self._device)
        return torch.cat([part.to(self._device) for part in parts])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.kernel.apply(x, self.packed, self.bias)
        return y if self._all_reduce is None else self._all_reduce(y)

    def weight(self) -> torch.Tensor:
        """The weight [O, I] as the product uses it, in the model's dtype."""
        return self.kernel.unpack(self.packed)


def _spec(name: str, shape: tuple[int, ...], bias: bool) -> tuple[WeightSpec, WeightSpec | None]:
    return WeightSpec(f"{name}.weight", shape), WeightSpec(f"{name}.bias", shape[:1], "zero") if bias else None


def column_linear(
    build: Builder, names: Sequence[str], in_features: int, outs: Sequence[int], *, bias: bool = False
) -> Linear:
    """Matrices ``names`` of ``outs`` rows each, every one divided by rows, stacked."""
    pieces = []
    for name, out in zip(names, outs):
        _divisible(build, name, out)
        pieces.append(Piece(*_spec(name, (out, in_features), bias), build.share(out)))
    return Linear(build, pieces, in_features, sum(outs) // build.size)


def row_linear(build: Builder, name: str, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
    """A matrix divided by input columns; the products are summed over the ranks."""
    _divisible(build, name, in_features)
    piece = Piece(*_spec(name, (out_features, in_features), bias), columns=build.share(in_features))
    return Linear(build, [piece], in_features // build.size, out_features, reduce=True)


def qkv_linear(build: Builder, names: tuple[str, str, str], in_features: int, *, bias: bool = False) -> Linear:
    """Query, key and value as one product, divided by heads."""
    config, dim = build.config, build.config.head_dim
    specs = [
        _spec(name, (heads * dim, in_features), bias)
        for name, heads in zip(names, (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    ]
    rows = qkv_rows(build)
    pieces = [Piece(weight, bias_spec, part) for (weight, bias_spec), part in zip(specs, rows)]
    return Linear(build, pieces, in_features, sum(part.stop - part.start for part in rows))


def qkv_rows(build: Builder) -> tuple[slice, slice, slice]:
    """This rank's rows of the query, the key and the value matrix. Ranks that share a kv head each hold it."""
    config, dim = build.config, build.config.head_dim
    heads, kv_heads = config.heads_of_rank(build.size)
    first = build.rank * config.num_kv_heads // build.size
    kv = slice(first * dim, (first + kv_heads) * dim)
    return slice(build.rank * heads * dim, (build.rank + 1) * heads * dim), kv, kv


def _divisible(build: Builder, name: str, extent: int) -> None:
    if extent % build.size:
        raise ConfigError(
            f"tensor_parallel_size={build.size}: the {extent} features of {name} cannot be divided so; take a divisor."
        )
