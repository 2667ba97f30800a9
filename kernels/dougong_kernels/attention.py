"""The hal's attention interface on the portable Triton kernels."""

from __future__ import annotations

from typing import ClassVar

import torch

from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Device,
    KVGroup,
    KVLayout,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    RaggedKV,
    Refusal,
)
from dougong_kernels.config import configs_for
from dougong_kernels.ops.write import packing, plane_view, write
from dougong_kernels.paged import PagedAttention, PagedPlan, Shape
from dougong_kernels.target import available, cores, fp8_mode, interpreted, target_name

__all__ = ["BatchInvariantTritonAttention", "TritonAttention", "TritonPlan"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_MAX_DIM = 256
_MAX_LATENT = 512
_SERVING_TOKENS = 1024
"""Limits of a server: it will need every kernel, so they are compiled side by side while the model loads."""


class TritonPlan(Plan):
    """The work lists of one step, one for a cache and one for ragged K and V, made when first asked for."""

    def __init__(self) -> None:
        self.paged: PagedPlan | None = None
        self.ragged: PagedPlan | None = None


class TritonAttention(AttentionKernel):
    """Paged attention for CUDA, ROCm and XPU in one family: split-KV decode, tiled extend, graphs of any mix.

    Runs of one object are ordered on one stream. Plans keep their device buffers' addresses; a replayed graph reads
    lengths and the block table's address from them.
    """

    layouts = (NHD,)
    invariant: ClassVar[bool] = False

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._where = torch.device(device.torch_device)
        self._paged: PagedAttention | None = None
        self._ragged: PagedAttention | None = None
        self._narrow = spec.kv_dtype != spec.dtype
        self._views: dict[int, tuple[LayerCache, torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        spec = query.spec
        refusals = []
        missing = available(torch.device(device.torch_device))
        if missing:
            return (Refusal(missing),)
        if spec.dtype not in _DTYPES:
            refusals.append(Refusal(f"dtype {spec.dtype}", "bfloat16, float16 or float32"))
        if spec.kv_dtype not in (spec.dtype, *_QUANTIZED):
            refusals.append(
                Refusal(f"kv dtype {spec.kv_dtype}", f"{spec.dtype}, int8, float8_e4m3fn or float8_e4m3fnuz")
            )
        if spec.scale <= 0:
            refusals.append(Refusal(f"scale {spec.scale}", "a scale above 0"))
        if spec.latent:
            rope = spec.head_dim - spec.head_dim_v
            if not (_power_of_2(spec.head_dim_v) and 16 <= spec.head_dim_v <= _MAX_LATENT):
                refusals.append(Refusal(f"latent width {spec.head_dim_v}", "a power of two from 16 to 512"))
            if not (_power_of_2(rope) and 16 <= rope <= 128):
                refusals.append(Refusal(f"rope part of {rope} beside the latent", "a power of two from 16 to 128"))
            if spec.kv_dtype != spec.dtype:
                refusals.append(Refusal("a quantised latent cache", f"kv dtype {spec.dtype}"))
            if query.ragged:
                refusals.append(Refusal("latent attention without a cache", "a latent cache"))
        elif max(spec.head_dim, spec.head_dim_v) > _MAX_DIM:
            refusals.append(Refusal(f"head dim {spec.head_dim}/{spec.head_dim_v}", f"up to {_MAX_DIM}"))
        if not query.ragged:
            if query.block_size < 1:
                refusals.append(Refusal(f"block size {query.block_size}", "1 or more; multiples of 16 are fastest"))
            for name, plane in query.layout.parsed.items():
                pack = packing(plane, spec.kv_dtype.itemsize)
                if pack is None or (spec.latent and pack):
                    refusals.append(Refusal(f"plane {name} lies as {plane.text!r}", "'b n h d' or 'b h n d'"))
            if "k" not in query.layout.planes:
                refusals.append(Refusal(f"layout {query.layout.name} keeps latent and rope apart", "one plane k"))
        if query.batch_invariant and not cls.invariant:
            refusals.append(
                Refusal("batch invariance: splits depend on the batch here", "the batch-invariant provider")
            )
        return tuple(refusals)

    @classmethod
    def tuned_block(cls, spec: AttentionSpec, layout: KVLayout, device: Device) -> int:
        return 16 if layout.block_sizes.allows(16) else layout.default_block

    def _shape(self, block_size: int) -> Shape:
        spec = self.spec
        target = target_name(self._where)
        packs = {}
        if block_size:
            planes, size = self.group.layout.parsed, spec.kv_dtype.itemsize
            packs = {f"pack_{name}": packing(planes[name], size) or 0 for name in ("k", "v") if name in planes}
        return Shape(
            num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            head_dim_v=spec.head_dim_v, block_size=block_size, scale=spec.scale, causal=spec.causal,
            window=spec.window or 0, softcap=spec.softcap or 0.0, alibi=spec.alibi, sinks=spec.sinks, lse=spec.lse,
            latent=spec.latent, fp8=fp8_mode(target, spec.kv_dtype), **packs,
            upcast=spec.dtype == torch.float32 or interpreted(),
        )  # fmt: skip

    def _make(self, block_size: int) -> PagedAttention:
        spec, limits = self.spec, self.limits
        settings = configs_for(
            target_name(self._where), max(spec.head_dim, spec.head_dim_v), latent=spec.latent, wide=not self._narrow,
            exact=spec.dtype == torch.float32,
        )  # fmt: skip
        made = PagedAttention(
            self._shape(block_size), max_rows=limits.max_rows, max_tokens=limits.max_tokens,
            max_kv_len=limits.max_kv_len, cores=cores(self._where), device=self._where, settings=settings,
            batch_invariant=self.invariant,
        )  # fmt: skip
        if limits.max_tokens >= _SERVING_TOKENS:
            made.compile_ahead(spec.dtype, spec.kv_dtype)
        return made

    def _for(self, ragged: bool) -> PagedAttention:
        found = self._ragged if ragged else self._paged
        if found is None:
            found = self._make(0 if ragged else self.group.kernel_block)
            if ragged:
                self._ragged = found
            else:
                self._paged = found
        return found

    def new_plan(self) -> TritonPlan:
        plan = TritonPlan()
        plan.paged = self._for(ragged=False).new_plan()
        return plan

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, TritonPlan) and into.paged is not None
        into.batch = batch
        self._plan(self._for(ragged=False), batch, into.paged)
        if into.ragged is not None:
            self._plan(self._for(ragged=True), batch, into.ragged)

    def _plan(self, attention: PagedAttention, batch: BatchView, into: PagedPlan) -> None:
        view = batch.groups[self.group.index]
        attention.plan(
            into, batch.cu_q, view.kv_len, view.block_table, num_rows=batch.num_rows, num_tokens=batch.num_tokens,
            max_q_len=batch.max_q_len, host_cu_q=batch.host_cu_q,
        )  # fmt: skip

    def run(
        self,
        plan: Plan,
        layer: LayerArgs,
        q: torch.Tensor,
        kv: LayerCache | RaggedKV,
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        assert isinstance(plan, TritonPlan) and plan.paged is not None
        spec = self.spec
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale} if self._narrow else {}
        if isinstance(kv, RaggedKV):
            attention = self._for(ragged=True)
            if plan.ragged is None:
                plan.ragged = attention.new_plan()
                self._plan(attention, plan.batch, plan.ragged)
            inner, k, v, start = plan.ragged, kv.k, kv.v, kv.cu_k
        else:
            attention, inner, start = self._for(ragged=False), plan.paged, None
            k, v = self._planes(kv)
        attention.run(
            inner, q, k, v, out, lse, kv_start=start,
            sinks=layer.sinks if spec.sinks else None, slopes=layer.slopes if spec.alibi else None, **scales,
        )  # fmt: skip

    def _planes(self, cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [blocks, N, K, D …] and [blocks, N, K, Dv …]; made once per cache, since run is on the step's path."""
        found = self._views.get(id(cache))
        if found is None or found[0] is not cache:
            k = plane_view(cache, "k")
            v = plane_view(cache, "v") if "v" in cache.planes else k[..., : self.spec.head_dim_v]
            found = self._views[id(cache)] = cache, k, v
        return found[1], found[2]

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)


class BatchInvariantTritonAttention(TritonAttention):
    """The same kernels with splits that depend on a row alone: its bits are the same whatever shares its batch."""

    invariant = True


def _power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
