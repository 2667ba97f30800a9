"""Attention over the paged cache, from a packed QKV row to the heads' outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dougong.hal import AttentionSpec, LayerArgs, QKVShape, RopeTable
from dougong.models.build import Builder
from dougong.models.context import StepContext
from dougong.models.layers.norm import RMSNorm
from dougong.models.weights import WeightSource, WeightSpec

__all__ = ["Attention", "AttentionLayer"]


class AttentionLayer:
    """What the runner knows of a layer: ``spec`` is this rank's, ``args`` what the layer brings to the kernel.

    ``bind`` is called once, when groups and caches are known.
    """

    def __init__(self, layer: int, spec: AttentionSpec, args: LayerArgs | None = None) -> None:
        self.layer_index = layer
        self.spec = spec
        self.args = LayerArgs() if args is None else args
        self.bind(0, layer)

    def bind(self, group_index: int, cache_layer: int | None = None) -> None:
        """Say which KV group this layer belongs to and, where caches are shared, whose cache it reads."""
        self.group_index = group_index
        self.cache_layer = self.layer_index if cache_layer is None else cache_layer
        self.writes = self.cache_layer == self.layer_index


class Attention(AttentionLayer):
    """Splits, norms, rotates and stores a packed QKV row, and runs the kernel."""

    def __init__(
        self,
        build: Builder,
        layer: int,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        args: LayerArgs | None = None,
    ) -> None:
        super().__init__(layer, build.specs[layer], args)
        self.table: RopeTable | None = build.rope(build.config.layers[layer].rope)
        self.shape = QKVShape(
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            head_dim_v=self.spec.head_dim_v,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=build.config.norm_eps,
            norm_offset=0.0 if q_norm is None else q_norm.offset,
        )
        self._norms = tuple(norm for norm in (q_norm, k_norm) if norm is not None)
        self._out = (self.spec.num_heads, self.spec.head_dim_v)
        self._width = self.spec.num_heads * self.spec.head_dim_v

    def weights(self) -> Iterator[WeightSpec]:
        for norm in self._norms:
            yield from norm.weights()

    def load(self, source: WeightSource) -> None:
        for norm in self._norms:
            norm.load(source)

    def __call__(self, qkv: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """qkv [T, (H+K)·D + K·Dv] (its memory may be changed) -> [T, H·Dv]."""
        group = self.group_index
        cache = ctx.caches[self.cache_layer]
        q = ctx.ops.qk_norm_rope_write(
            qkv, self.shape, self.table, positions, self.args, cache if self.writes else None, ctx.slots[group]
        )
        out = qkv.new_empty((qkv.shape[0], *self._out))
        ctx.kernels[group].run(ctx.plans[group], self.args, q, cache, out=out)
        return out.view(-1, self._width)
