"""The fused ops over the C++ kernels. Each agrees with its reference in ``dougong.hal.reference.ops``."""

from __future__ import annotations

import weakref
from ctypes import addressof

import torch

from dougong.hal import LayerArgs, LayerCache, QKVShape, RopeTable
from dougong_cpu._abi import Rope
from dougong_cpu._values import DTYPES
from dougong_cpu.attention import write_struct
from dougong_cpu.library import load

__all__ = ["add_rms_norm", "argmax", "gelu_tanh_mul", "qk_norm_rope_write", "rms_norm", "rope", "silu_mul"]

_library = load()
_rms, _gated, _qkv, _argmax = _library.rms, _library.gated, _library.qkv, _library.argmax
_empty = torch.empty


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(x as rows, number of rows, elements between rows); the last dimension lies together."""
    if x.dim() == 2:
        st, last = x.stride()
        if last == 1:
            return x, x.shape[0], st
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat, flat.shape[0], flat.shape[1]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., E] normed and weighted, new memory."""
    rows, count, st = _rows(x)
    n = rows.shape[1]
    dtype = x.dtype
    y = _empty(x.shape, dtype=dtype)
    _rms(
        rows.data_ptr(), weight.data_ptr(), None, y.data_ptr(), count, n, st, 0, n, eps, offset,
        DTYPES[dtype], DTYPES[weight.dtype],
    )  # fmt: skip
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), in the memory of ``x`` and ``residual``."""
    if x.dim() != 2 or residual.dim() != 2 or x is residual:
        total = x + residual
        return rms_norm(total, weight, eps, offset), total
    x_st, x_last = x.stride()
    r_st, r_last = residual.stride()
    if x_last != 1 or r_last != 1 or x.dtype is not residual.dtype:
        total = x + residual
        return rms_norm(total, weight, eps, offset), total
    count, n = x.shape
    at = x.data_ptr()
    _rms(
        at, weight.data_ptr(), residual.data_ptr(), at, count, n, x_st, r_st, x_st, eps, offset,
        DTYPES[x.dtype], DTYPES[weight.dtype],
    )  # fmt: skip
    return x, residual


def _gate(gate_up: torch.Tensor, kind: int) -> torch.Tensor:
    rows, count, st = _rows(gate_up)
    n = rows.shape[1] // 2
    dtype = gate_up.dtype
    y = _empty((count, n), dtype=dtype)
    _gated(rows.data_ptr(), st, y.data_ptr(), n, count, n, DTYPES[dtype], kind)
    return y if gate_up.dim() == 2 else y.view(*gate_up.shape[:-1], n)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2I] -> silu(first half) * second half."""
    return _gate(gate_up, 0)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2I] -> gelu(first half, tanh form) * second half."""
    return _gate(gate_up, 1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> [R] int64: the lowest id of the largest; NaN counts as the largest."""
    rows, count, st = _rows(logits)
    y = _empty((count,), dtype=torch.int64)
    _argmax(rows.data_ptr(), st, y.data_ptr(), count, rows.shape[1], DTYPES[logits.dtype])
    return y


def rope(x: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D] at positions [T] int64, new memory."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, dim = x.shape
    y = _empty(x.shape, dtype=x.dtype)
    struct = Rope(q=x.data_ptr(), q_out=y.data_ptr(), positions=positions.data_ptr(), heads=heads)
    struct.q_st, struct.q_sh = x.stride(0), x.stride(1)
    struct.qo_st, struct.qo_sh = heads * dim, dim
    struct.write.dim, struct.write.tokens, struct.write.dtype = dim, tokens, DTYPES[x.dtype]
    _set_table(struct, table)
    _library.rope(addressof(struct))
    return y


def _set_table(struct: Rope, table: RopeTable) -> None:
    cos_sin = table.cos_sin
    assert cos_sin.dtype == torch.float32 and cos_sin.stride(1) == 1, "a rope table is float32 rows"
    struct.rotary_dim = cos_sin.shape[1]
    struct.interleaved = int(table.interleaved)
    struct.table_stride = cos_sin.stride(0)
    struct.cos = cos_sin.data_ptr()
    struct.sin = cos_sin.data_ptr() + cos_sin.shape[1] // 2 * 4


class _Bound:
    """What never changes about one layer's rope and cache write."""

    __slots__ = ("address", "cache", "heads", "itemsize", "keep", "layer", "q_shape", "shape", "struct", "table")

    def __init__(
        self, shape: QKVShape, table: RopeTable | None, layer: LayerArgs, cache: LayerCache | None, dtype: torch.dtype
    ) -> None:
        self.shape, self.table, self.layer = shape, table, layer
        self.keep: list[torch.Tensor] = []
        struct = Rope(heads=shape.num_heads, norm_offset=shape.norm_offset, eps=shape.eps)
        if cache is not None:
            struct.write = write_struct(cache.spec, layer, cache, self.keep)
            struct.write_cache = 1
        struct.write.dim, struct.write.dtype = shape.head_dim, DTYPES[dtype]
        struct.write.kv_heads = shape.num_kv_heads
        struct.write.dim_v = shape.head_dim_v
        for field, weight in (("q_norm", shape.q_norm), ("k_norm", shape.k_norm)):
            if weight is not None:
                kept = weight.detach().contiguous()
                kept = kept if kept.dtype == dtype else kept.float()
                struct.norm_dtype = DTYPES[kept.dtype]
                self.keep.append(kept)
                setattr(struct, field, kept.data_ptr())
        if table is not None:
            _set_table(struct, table)
        self.struct = struct
        self.address = addressof(struct)
        self.cache: weakref.ref[LayerCache] | None = None
        self.heads = shape.num_heads
        self.itemsize = dtype.itemsize


# Entries go with their cache: this table must not keep the memory of a closed engine, and a cache's id is free for
# another only after its entry is gone.
_bound: dict[tuple[int, int, torch.dtype], _Bound] = {}


def _bind(
    shape: QKVShape, table: RopeTable | None, layer: LayerArgs, cache: LayerCache | None, dtype: torch.dtype
) -> _Bound:
    if len(_bound) > 4096:
        _bound.clear()
    key = (id(shape), id(cache), dtype)
    bound = _bound[key] = _Bound(shape, table, layer, cache, dtype)
    if cache is not None:
        bound.cache = weakref.ref(cache, lambda _: _bound.pop(key, None))
    return bound


def qk_norm_rope_write(
    qkv: torch.Tensor,
    shape: QKVShape,
    table: RopeTable | None,
    positions: torch.Tensor,
    layer: LayerArgs,
    cache: LayerCache | None,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Norm and rotate q and k of qkv [T, (H+K)·D + K·Dv], store k and v; returns q [T, H, D], a view of ``qkv``."""
    bound = _bound.get((id(shape), id(cache), qkv.dtype))
    if bound is None or bound.layer is not layer or bound.table is not table:
        bound = _bind(shape, table, layer, cache, qkv.dtype)
    assert positions.dtype is torch.int64 and slots.dtype is torch.int64, "positions and slots are int64"
    row, last = qkv.stride()
    if last != 1:
        qkv = qkv.contiguous()
        row = qkv.stride(0)
    tokens = qkv.shape[0]
    _qkv(bound.address, qkv.data_ptr(), positions.data_ptr(), slots.data_ptr(), tokens, row, bound.itemsize)
    dim = shape.head_dim
    return qkv.as_strided((tokens, bound.heads, dim), (row, dim, 1))
