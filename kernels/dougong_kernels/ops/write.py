"""Rope, QK norm and the cache write."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import LayerArgs, LayerCache
from dougong.hal.layout import PlaneLayout
from dougong.hal.rope import QKVShape, RopeTable
from dougong_kernels.ops.support import supports
from dougong_kernels.target import early_start
from dougong_kernels.triton.rotate import rotate_write_kernel

__all__ = ["packing", "plane_view", "qk_norm_rope_write", "rope", "write"]

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
    rotary = 0 if table is None else table.rotary_dim
    kind, page, scaled = 0, 1, False
    k_scale: Any = 1.0
    v_scale: Any = 1.0
    k_cache: Any = first
    v_cache: Any = first
    cs: tuple[int, ...] = (0, 0, 0)
    vs: tuple[int, ...] = (0, 0, 0)
    pack_k, pack_v = 0, 0
    write_v = False
    if cache is not None:
        page = cache.block_size
        k_cache = plane_view(cache, "k")
        write_v = "v" in cache.planes
        v_cache = plane_view(cache, "v") if write_v else k_cache
        cs, vs = k_cache.stride()[:3], v_cache.stride()[:3]
        pack_k = packing(cache.layout.parsed["k"], k_cache.itemsize) or 0
        pack_v = (packing(cache.layout.parsed["v"], v_cache.itemsize) or 0) if write_v else 0
        if cache.spec.kv_dtype != first.dtype:
            assert layer is not None
            if cache.spec.kv_dtype in _KINDS:
                kind = _KINDS[cache.spec.kv_dtype]
            elif cache.spec.kv_dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(
                    f"a cache in {cache.spec.kv_dtype}: int8, float8_e4m3fn, float8_e4m3fnuz or the model's dtype is "
                    "needed"
                )
            k_scale, v_scale = layer.k_scale, layer.v_scale
            scaled = isinstance(k_scale, torch.Tensor) or isinstance(v_scale, torch.Tensor)
            if scaled:
                k_scale, v_scale = (
                    x if isinstance(x, torch.Tensor) else torch.full((1,), x, device=first.device)
                    for x in (k_scale, v_scale)
                )
        if kind >= 2:
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    per = min(_pow2(max(heads, kv_heads)), 4 if tokens <= 64 else 16)
    blocks = -(-heads // per)
    if cache is not None:
        blocks += -(-kv_heads // per) * (2 if write_v else 1)
    none, early = first, early_start(first.device)
    q, k, v, q_out = (x if x is not None else none for x in (q, k, v, q_out))
    norm_q = shape.q_norm if shape is not None else None
    norm_k = shape.k_norm if shape is not None else None
    rotate_write_kernel[(tokens, blocks)](
        q, k, v, q_out, k_cache, v_cache, slots, positions, None if table is None else table.cos_sin, norm_q, norm_k,
        k_scale, v_scale, 0.0 if shape is None else shape.norm_offset, 0.0 if shape is None else shape.eps,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        q_out.stride(0), q_out.stride(1), *cs, *vs, 0 if table is None else table.cos_sin.stride(0),
        H=heads, K=kv_heads, D=dim, DV=dim_v, R=rotary, HALF=_pow2(rotary // 2), REST=_pow2(dim - rotary),
        RESTV=_pow2(dim_v), HEADS=per, PAGE=page, Q_NORM=norm_q is not None, K_NORM=norm_k is not None,
        OFFSET=shape is not None and shape.norm_offset != 0, INTERLEAVED=table is not None and table.interleaved,
        KIND=kind, SCALES=scaled, WRITE=cache is not None, WRITE_V=write_v, PACK_K=pack_k, PACK_V=pack_v,
        EARLY=bool(early), num_warps=min(4, max(1, per * _pow2(dim) // 256)), **early,
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
