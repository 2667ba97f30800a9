"""Paged and ragged attention over the C++ kernels."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch

from dougong.hal import (
    HND,
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
from dougong_cpu import threads
from dougong_cpu._abi import Attention, Write
from dougong_cpu._values import DTYPES, plane_views, scale_values
from dougong_cpu.library import load

__all__ = ["CpuAttention", "CpuPlan"]

_KV_DTYPES = (torch.int8, torch.float8_e4m3fn)
_MOST_LAYERS = 1024


class CpuPlan(Plan):
    """The batch's addresses. ``batch`` keeps its tensors alive; they may not move until the step is over."""

    def __init__(self) -> None:
        self.step = Attention()
        self.address = addressof(self.step)
        self.tensors: tuple[torch.Tensor, ...] = ()


class _Layer:
    """What never changes about one layer: its cache's addresses and strides, its scales, sinks and slopes."""

    __slots__ = ("address", "args", "cache", "keep", "struct", "write", "write_address")

    def __init__(self, spec: AttentionSpec, args: LayerArgs, cache: LayerCache) -> None:
        self.args = args
        self.cache = cache
        k, v = plane_views(cache)
        self.struct = _constants(spec)
        self.struct.k, self.struct.v = k.data_ptr(), v.data_ptr()
        self.struct.k_sb, self.struct.k_sn, self.struct.k_sh, self.struct.k_sd = k.stride()
        self.struct.v_sb, self.struct.v_sn, self.struct.v_sh, self.struct.v_sd = v.stride()
        self.struct.block = cache.block_size
        self.keep = [k, v, *_layer_tensors(spec, args, self.struct)]
        self.address = addressof(self.struct)
        self.write = write_struct(spec, args, cache, self.keep)
        self.write_address = addressof(self.write)


def _constants(spec: AttentionSpec) -> Attention:
    return Attention(
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        dim=spec.head_dim,
        dim_v=spec.head_dim_v,
        q_dtype=DTYPES[spec.dtype],
        kv_dtype=DTYPES[spec.kv_dtype],
        causal=int(spec.causal),
        window=spec.window or 0,
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
    )


def _layer_tensors(spec: AttentionSpec, args: LayerArgs, struct: Attention) -> list[torch.Tensor]:
    """Point ``struct`` at the layer's own tensors; returns them, to be kept alive."""
    keep: list[torch.Tensor] = []

    def point(field: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
        if tensor.numel() not in (1, size):
            raise ValueError(f"{field}: {tensor.numel()} values for {size} heads")
        keep.append(tensor)
        setattr(struct, field, tensor.data_ptr())
        return tensor

    if spec.kv_dtype != spec.dtype:
        for name in ("k_scale", "v_scale"):
            values = point(name, scale_values(getattr(args, name)), spec.num_kv_heads)
            setattr(struct, f"{name}_stride", int(values.numel() > 1))
    for name, wanted in (("sinks", spec.sinks), ("slopes", spec.alibi)):
        if not wanted:
            continue
        values = getattr(args, name)
        if values is None:
            raise ValueError(f"the attention spec says {name}, but the layer brings none")
        point(name, values.detach().to("cpu", torch.float32).expand(spec.num_heads).contiguous(), spec.num_heads)
    return keep


def write_struct(spec: AttentionSpec, args: LayerArgs, cache: LayerCache, keep: list[torch.Tensor]) -> Write:
    """The fixed part of a cache write; tensors it points at are added to ``keep``."""
    k, v = plane_views(cache)
    latent = "v" not in cache.planes  # V is a view of K and is written with it
    out = Write(
        k_cache=k.data_ptr(), v_cache=v.data_ptr(), kv_heads=spec.num_kv_heads, dim=spec.head_dim,
        dim_v=0 if latent else spec.head_dim_v, block=cache.block_size,
        dtype=DTYPES[spec.dtype], cache_dtype=DTYPES[spec.kv_dtype],
    )  # fmt: skip
    out.kc_sb, out.kc_sn, out.kc_sh, out.kc_sd = k.stride()
    out.vc_sb, out.vc_sn, out.vc_sh, out.vc_sd = v.stride()
    if spec.kv_dtype != spec.dtype:
        for name in ("k_scale", "v_scale"):
            values = scale_values(getattr(args, name))
            keep.append(values)
            setattr(out, name, values.data_ptr())
            setattr(out, f"{name}_stride", int(values.numel() > 1))
    return out


class CpuAttention(AttentionKernel):
    """Every feature of the contract over plain layouts of any strides; results do not depend on the batch."""

    layouts = (NHD, HND)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        spec, refusals = query.spec, []
        if device.type != "cpu":
            refusals.append(Refusal(f"device {device.type}: runs on cpu"))
        if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            refusals.append(Refusal(f"queries in {spec.dtype}", "float32, bfloat16 or float16"))
        if spec.kv_dtype != spec.dtype and spec.kv_dtype not in _KV_DTYPES:
            refusals.append(
                Refusal(f"a cache in {spec.kv_dtype} with queries in {spec.dtype}", "int8 or float8_e4m3fn")
            )
        planes = set(query.layout.planes)
        if not query.ragged and planes != {"k", "v"} and not (spec.latent and planes == {"k"}):
            refusals.append(Refusal(f"cache planes {', '.join(sorted(planes))}", "k and v"))
        if not query.ragged and any(plane.tiles for plane in query.layout.parsed.values()):
            refusals.append(Refusal(f"layout {query.layout.name} is tiled", "nhd or hnd"))
        return tuple(refusals)

    @classmethod
    def tuned_block(cls, spec: AttentionSpec, layout: KVLayout, device: Device) -> int:
        return 16 if layout.block_sizes.allows(16) else layout.default_block

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._library = load()
        self._attend = self._library.attend
        self._store = self._library.store
        self._dtype = spec.dtype
        self._q_shape, self._out_shape = (spec.num_heads, spec.head_dim), (spec.num_heads, spec.head_dim_v)
        self._layers: dict[tuple[int, int], _Layer] = {}

    def new_plan(self) -> CpuPlan:
        return CpuPlan()

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, CpuPlan)
        view = batch.groups[self.group.index]
        table, step = view.block_table, into.step
        if table.stride(-1) != 1:
            table = table.contiguous()
        into.batch = batch
        into.tensors = (batch.cu_q.contiguous(), view.kv_len.contiguous(), table)
        for tensor in into.tensors:
            assert tensor.dtype == torch.int32, f"{tensor.dtype}: batch metadata is int32"
        step.rows = batch.num_rows
        step.cu_q, step.kv_len, step.block_table = (tensor.data_ptr() for tensor in into.tensors)
        step.bt_sb = table.stride(0)
        step.threads = threads.refresh()

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
        # The native code gets addresses: what lies there must be what the spec says.
        assert q.dtype is self._dtype and q.shape[1:] == self._q_shape, self._unlike("queries", q, self._q_shape)
        assert out.dtype is self._dtype and out.shape[1:] == self._out_shape, self._unlike("out", out, self._out_shape)
        if type(kv) is RaggedKV:
            self._run_ragged(plan, layer, q, kv, out, lse)
            return
        known = self._layers.get((id(kv), id(layer))) or self._learn(layer, kv)
        q_st, q_sh, q_sd = q.stride()
        o_st, o_sh, o_sd = out.stride()
        if q_sd != 1 or o_sd != 1 or lse is not None:
            self._run_strided(plan, known, q, out, lse)
            return
        self._attend(known.address, plan.address, q.data_ptr(), out.data_ptr(), None, q_st, q_sh, o_st, o_sh)  # type: ignore[attr-defined]

    def _unlike(self, name: str, x: torch.Tensor, shape: tuple[int, int]) -> str:
        return f"{name}: {x.dtype} {tuple(x.shape)}; the spec says {self._dtype} (tokens, {shape[0]}, {shape[1]})"

    def _learn(self, layer: LayerArgs, cache: Any) -> _Layer:
        if len(self._layers) >= _MOST_LAYERS:  # a host framework that wraps its cache anew in each call
            self._layers.clear()
        known = _Layer(self.spec, layer, cache)
        self._layers[id(cache), id(layer)] = known  # the entry holds both, so their ids stay taken
        return known

    def _run_strided(
        self, plan: Any, known: _Layer, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """Any strides, and LSE: fields are set one by one."""
        struct = Attention.from_buffer_copy(known.struct)
        step = plan.step
        for field in ("rows", "threads", "span", "cu_q", "kv_len", "block_table", "bt_sb"):
            setattr(struct, field, getattr(step, field))
        self._finish(struct, q, out, lse)

    def _finish(self, struct: Attention, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        struct.q, struct.out = q.data_ptr(), out.data_ptr()
        struct.q_st, struct.q_sh, struct.q_sd = q.stride()
        struct.o_st, struct.o_sh, struct.o_sd = out.stride()
        if lse is not None:
            struct.lse = lse.data_ptr()
            struct.lse_st, struct.lse_sh = lse.stride()
        self._library.attention(addressof(struct))

    def _run_ragged(
        self, plan: Any, layer: LayerArgs, q: torch.Tensor, kv: RaggedKV, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        struct = _constants(self.spec)
        struct.kv_dtype = DTYPES[kv.k.dtype]
        keep = _layer_tensors(self.spec, layer, struct)
        if kv.k.dtype == self.spec.dtype:
            struct.k_scale = struct.v_scale = None
        struct.k, struct.v, struct.cu_k = kv.k.data_ptr(), kv.v.data_ptr(), kv.cu_k.data_ptr()
        struct.k_sn, struct.k_sh, struct.k_sd = kv.k.stride()
        struct.v_sn, struct.v_sh, struct.v_sd = kv.v.stride()
        struct.rows, struct.cu_q, struct.threads = plan.step.rows, plan.step.cu_q, plan.step.threads
        struct.block = 1
        self._finish(struct, q, out, lse)
        del keep

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        known = self._layers.get((id(cache), id(layer))) or self._learn(layer, cache)
        if k.dtype != self.spec.dtype or v.dtype != self.spec.dtype:
            cache.write_scaled(layer, k, v, slots)  # already in the cache's dtype (swapped in), or widened by a caller
            return
        k_st, k_sh, k_sd = k.stride()
        v_st, v_sh, v_sd = v.stride()
        if k_sd != 1 or v_sd != 1:
            k, v = k.contiguous(), v.contiguous()
            (k_st, k_sh, _), (v_st, v_sh, _) = k.stride(), v.stride()
        self._store(
            known.write_address, k.data_ptr(), v.data_ptr(), slots.data_ptr(), k.shape[0], k_st, k_sh, v_st, v_sh
        )
