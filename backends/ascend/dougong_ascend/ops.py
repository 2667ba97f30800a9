"""Norms, rotary embedding and activation through the vendor's fused operators, behind the core's signatures."""

from __future__ import annotations

import torch

from dougong.hal import LayerArgs, LayerCache, QKVShape, RopeTable
from dougong.hal.reference import ops as reference
from dougong_ascend.store import STORED, store_scaled

__all__ = ["add_rms_norm", "qk_norm_rope_write", "qk_norm_rope_write_310p", "rms_norm", "rope", "silu_mul"]

#: Bounds of ``npu_rotary_mul``: elements of a head, and heads.
_ROTARY_DIM, _ROTARY_HEADS = 896, 1000


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., E] / rms(x) * (offset + weight [E]), in x's dtype."""
    if x.numel() == 0 or weight.dtype != x.dtype:
        return reference.rms_norm(x, weight, eps, offset)
    if offset == 1.0:
        return torch.ops.npu.npu_gemma_rms_norm(x.contiguous(), weight, eps)[0]  # type: ignore[no-any-return]
    if offset:
        return reference.rms_norm(x, weight, eps, offset)
    return torch.ops.npu.npu_rms_norm(x.contiguous(), weight, eps)[0]  # type: ignore[no-any-return]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    if offset or x.numel() == 0 or weight.dtype != x.dtype or residual.dtype != x.dtype:
        total = x + residual
        return rms_norm(total, weight, eps, offset), total
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
    return normed, total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2I] -> silu(first half) * second half, [..., I]."""
    if gate_up.numel() == 0:
        return reference.silu_mul(gate_up)
    return torch.ops.npu.npu_swiglu(gate_up.contiguous(), dim=-1)  # type: ignore[no-any-return]


def rope(x: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the first R elements of each head: x [T, H, D], positions [T] int64 -> [T, H, D], new memory.

    In float32, which the operator takes: rounded cosines would cost a bit at long positions.
    """
    size = table.rotary_dim
    if x.numel() == 0 or size >= _ROTARY_DIM or x.shape[1] >= _ROTARY_HEADS:
        return reference.rope(x, table, positions)
    cos, sin = table.cos_sin[positions].chunk(2, dim=-1)
    if table.interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    else:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    turned = x[..., :size].float().contiguous()
    if table.interleaved:  # this mode wants one angle per place in the sequence, whatever the batch: [1, T, 1, R]
        out = torch.ops.npu.npu_rotary_mul(turned[None], cos[None, :, None], sin[None, :, None], "interleave")
    else:
        out = torch.ops.npu.npu_rotary_mul(turned[None], cos[None, :, None], sin[None, :, None])
    if size == x.shape[-1]:
        return out[0].to(x.dtype)  # type: ignore[no-any-return]
    return torch.cat((out[0].to(x.dtype), x[..., size:]), dim=-1)


def qk_norm_rope_write(
    qkv: torch.Tensor,
    shape: QKVShape,
    table: RopeTable | None,
    positions: torch.Tensor,
    layer: LayerArgs,
    cache: LayerCache | None,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Split a packed QKV, norm and rotate queries and keys, store keys and values at ``slots``; returns q [T, H, D]."""
    return reference.compose_qkv(
        qkv, shape, table, positions, layer, cache, slots, norm=rms_norm, rotate=rope, store=_store
    )


def qk_norm_rope_write_310p(
    qkv: torch.Tensor,
    shape: QKVShape,
    table: RopeTable | None,
    positions: torch.Tensor,
    layer: LayerArgs,
    cache: LayerCache | None,
    slots: torch.Tensor,
) -> torch.Tensor:
    """As ``qk_norm_rope_write``, with torch's operators for norm and rotation."""
    return reference.compose_qkv(qkv, shape, table, positions, layer, cache, slots, store=_store)


def _store(cache: LayerCache, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    if cache.layout.name in STORED and cache.spec.kv_dtype in (k.dtype, torch.int8):
        store_scaled(cache, layer, k, v, slots)
    else:  # a layout or dtype of the reference kernel's
        cache.write_scaled(layer, k, v, slots)
