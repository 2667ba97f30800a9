"""Rope, QK norm and the cache write."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from dougong.hal import LayerArgs, LayerCache
from dougong.hal.layout import PlaneLayout
from dougong.hal.rope import QKVShape, RopeTable
from dougong_kernels.launch import Launcher, signature
from dougong_kernels.ops.support import supports
from dougong_kernels.target import early_start
from dougong_kernels.triton.rotate import rotate_write_kernel

__all__ = ["packing", "plane_view", "qk_norm_rope_write", "rope", "write"]

_ROTATE_WRITE = Launcher(rotate_write_kernel)
_KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e4m3fnuz: 3}


def _pow2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0


def plane_view(cache: LayerCache, name: str) -> torch.Tensor:
    """A plane as [blocks, N, K, D], whatever order its axes lie in; [blocks, N, K, D/x, x] where d is split.

    Raises:
        ValueError: the kernels cannot reach its elements.
    """
    parsed = cache.layout.parsed[name]
    if packing(parsed, 1) is None:
        raise ValueError(f"plane {name} lies as {parsed.text!r}: the Triton kernels cannot read it")
    heads, dim = cache.spec.plane_dims(name)
    return parsed.canonical(cache.planes[name], cache.block_size, heads, dim)


def packing(parsed: PlaneLayout, itemsize: int) -> int | None:
    """How many elements of a head lie together, the next as many being N tokens on; 0: all of them; None: neither.

    "b n h d" and "b h n d" give 0, "b h d/8 n 8" 8, "b h d n" 1.
    """
    parts = [(part.axis, part.role) for dim in parsed.dims for part in dim]
    if not parsed.tiles:
        return 0 if parts[-1] == ("d", "whole") else 1 if parts[-2:] == [("d", "whole"), ("n", "whole")] else None
    if set(parsed.tiles) == {"d"} and parts[-3:] == [("d", "outer"), ("n", "whole"), ("d", "inner")]:
        return parsed.tiles["d"] or 16 // itemsize
    return None


@dataclass(frozen=True)
class _Target:
    """A layer's cache as the kernel takes it. ``scaled``: values are divided by the layer's scales."""

    k: torch.Tensor
    v: torch.Tensor
    strides: tuple[int, ...]
    page: int
    pack_k: int
    pack_v: int
    kind: int
    scaled: bool
    write_v: bool


_TARGETS: dict[tuple[int, torch.dtype], tuple[weakref.ref[LayerCache], _Target]] = {}


def _target(cache: LayerCache, dtype: torch.dtype) -> _Target:
    """Made once per cache and dtype of what is written: writes are on the step's path."""
    key = id(cache), dtype
    found = _TARGETS.get(key)
    if found is not None and found[0]() is cache:
        return found[1]
    kept = cache.spec.kv_dtype
    if kept != dtype and kept not in _KINDS and kept not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"a cache in {kept}: int8, float8_e4m3fn, float8_e4m3fnuz or the model's dtype is needed")
    kind = _KINDS[kept] if kept != dtype and kept in _KINDS else 0
    k = plane_view(cache, "k")
    write_v = "v" in cache.planes
    v = plane_view(cache, "v") if write_v else k
    pack_k = packing(cache.layout.parsed["k"], k.itemsize) or 0
    pack_v = (packing(cache.layout.parsed["v"], v.itemsize) or 0) if write_v else 0
    if kind >= 2:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    strides = *k.stride()[:3], *v.stride()[:3]
    made = _Target(k, v, strides, cache.block_size, pack_k, pack_v, kind, kept != dtype, write_v)
    _TARGETS[key] = weakref.ref(cache, lambda _: _TARGETS.pop(key, None)), made
    return made


def _scales(layer: LayerArgs, device: torch.device) -> tuple[Any, Any, bool]:
    """(K's scale, V's scale, whether they are tensors)."""
    k_scale, v_scale = layer.k_scale, layer.v_scale
    if not (isinstance(k_scale, torch.Tensor) or isinstance(v_scale, torch.Tensor)):
        return float(k_scale), float(v_scale), False
    both = (x if isinstance(x, torch.Tensor) else torch.full((1,), x, device=device) for x in (k_scale, v_scale))
    return *both, True


def _launch(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_out: torch.Tensor | None,
    cache: LayerCache | None,
    slots: torch.Tensor | None,
    table: RopeTable | None,
    positions: torch.Tensor | None,
    layer: LayerArgs | None,
    shape: QKVShape | None,
    dims: tuple[int, int, int, int],
) -> None:
    """q [T, H, D], k [T, K, D], v [T, K, Dv]; dims (H, K, D, Dv), H 0 without queries."""
    heads, kv_heads, dim, dim_v = dims
    first = q if q is not None else k
    assert first is not None
    tokens = first.shape[0]
    if tokens == 0:
        return
    per = min(_pow2(max(heads, kv_heads)), 4 if tokens <= 64 else 16)
    blocks = -(-heads // per)
    k_scale, v_scale, scales = 1.0, 1.0, False
    if cache is None:
        to = _Target(first, first, (0,) * 6, page=1, pack_k=0, pack_v=0, kind=0, scaled=False, write_v=False)
    else:
        to = _target(cache, first.dtype)
        blocks += -(-kv_heads // per) * (2 if to.write_v else 1)
    if to.scaled:
        assert layer is not None
        k_scale, v_scale, scales = _scales(layer, first.device)
    q, k, v, q_out = (x if x is not None else first for x in (q, k, v, q_out))
    cos_sin, rotary, interleaved = (None, 0, False) if table is None else (
        table.cos_sin, table.rotary_dim, table.interleaved,
    )  # fmt: skip
    norm_q, norm_k, offset, eps = (None, None, 0.0, 0.0) if shape is None else (
        shape.q_norm, shape.k_norm, shape.norm_offset, shape.eps,
    )  # fmt: skip
    early = early_start(first.device)
    constants = (
        heads, kv_heads, dim, dim_v, rotary, _pow2(rotary // 2), _pow2(dim - rotary), _pow2(dim_v), per, to.page,
        norm_q is not None, norm_k is not None, offset != 0, interleaved, to.kind, scales, cache is not None,
        to.write_v, to.pack_k, to.pack_v, bool(early),
    )  # fmt: skip
    strides = (
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *q_out.stride()[:2], *to.strides,
        0 if cos_sin is None else cos_sin.stride(0),
    )  # fmt: skip
    tensors = q, k, v, q_out, to.k, to.v, slots, positions, cos_sin, norm_q, norm_k
    scaling = signature(k_scale, v_scale) if scales else ()
    _ROTATE_WRITE(
        (constants, strides, signature(*tensors), scaling, first.device.index), (tokens, blocks, 1),
        (*tensors, k_scale, v_scale, float(offset), float(eps), *strides, *constants),
        {"num_warps": min(4, max(1, per * _pow2(dim) // 256)), **early},
    )  # fmt: skip


def qk_norm_rope_write(
    qkv: torch.Tensor,
    shape: QKVShape,
    table: RopeTable | None,
    positions: torch.Tensor,
    layer: LayerArgs,
    cache: LayerCache | None,
    slots: torch.Tensor,
) -> torch.Tensor:
    """One launch; the rotated queries stay where they lie in ``qkv``, and a view of them is returned."""
    tokens = qkv.shape[0]
    q, k, v = qkv.split(list(shape.splits), dim=-1)
    q = q.unflatten(-1, (shape.num_heads, shape.head_dim))
    if cache is None and table is None and shape.q_norm is None:
        return q
    _launch(
        q, k.unflatten(-1, (shape.num_kv_heads, shape.head_dim)),
        v.unflatten(-1, (shape.num_kv_heads, shape.head_dim_v)),
        q, cache, slots, table, positions, layer, shape,
        (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim_v),
    )  # fmt: skip
    assert q.shape[0] == tokens
    return q


def write(layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
    """k [T, K, D] and v [T, K, Dv], any token and head strides, into ``slots`` [T] int64."""
    dims = (0, k.shape[1], k.shape[2], v.shape[2])
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    _launch(None, k, v, None, cache, slots, None, None, layer, None, dims)


def rope(x: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] -> rotated, new memory."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, None, out, None, None, table, positions, None, None, (x.shape[1], 1, x.shape[2], x.shape[2]))
    return out


qk_norm_rope_write.supports = supports  # type: ignore[attr-defined]
rope.supports = supports  # type: ignore[attr-defined]
