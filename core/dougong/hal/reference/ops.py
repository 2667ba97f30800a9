"""The fused ops in plain torch. Each is the definition of its op: a vendor's must agree with it.

Norms and rope compute in float32 and round once, as the model families' own code does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dougong.hal.attention_spec import LayerArgs
from dougong.hal.cache import LayerCache
from dougong.hal.rope import QKVShape, RopeTable

__all__ = [
    "add_rms_norm",
    "compose_qkv",
    "gelu_tanh_mul",
    "merge_lse",
    "qk_norm_rope_write",
    "rms_norm",
    "rope",
    "silu_mul",
]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., E] / rms(x) * (offset + weight [E]), in x's dtype.

    With offset 0 the normalised value is rounded before it is multiplied (Llama's order); otherwise the product is
    taken in float32 (Gemma's).
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * (offset + weight.float())).to(x.dtype)
    return wide.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). An implementation may reuse the memory of ``x`` and ``residual``."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2I] -> silu(first half) * second half, [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2I] -> gelu(first half, tanh form) * second half, [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def rope(x: torch.Tensor, table: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the first R elements of each head: x [T, H, D], positions [T] int64 -> [T, H, D], new memory."""
    cos_sin = table.cos_sin[positions]
    cos, sin = cos_sin.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    size = table.rotary_dim
    turned, rest = x[..., :size].float(), x[..., size:]
    if table.interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    else:
        low, high = turned.chunk(2, dim=-1)
        out = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def qk_norm_rope_write(
    qkv: torch.Tensor,
    shape: QKVShape,
    table: RopeTable | None,
    positions: torch.Tensor,
    layer: LayerArgs,
    cache: LayerCache | None,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Split a packed QKV, norm and rotate queries and keys, store keys and values at ``slots``.

    qkv [T, (H+K)·D + K·Dv] is scratch: its memory may be changed and the answer may lie in it.
    Returns q [T, H, D]. ``cache`` None: nothing is stored (a layer that reads another's cache).
    """
    return compose_qkv(qkv, shape, table, positions, layer, cache, slots)


def compose_qkv(
    qkv: torch.Tensor,
    shape: QKVShape,
    table: RopeTable | None,
    positions: torch.Tensor,
    layer: LayerArgs,
    cache: LayerCache | None,
    slots: torch.Tensor,
    *,
    norm: Callable[..., torch.Tensor] = rms_norm,
    rotate: Callable[..., torch.Tensor] = rope,
    store: Callable[..., None] = LayerCache.write_scaled,
) -> torch.Tensor:
    """`qk_norm_rope_write` from its parts, for backends that have some of them.

    ``norm`` and ``rotate`` are called as this module's `rms_norm` and `rope`, ``store`` as ``store(cache, layer, k, v,
    slots)`` with k [T, K, D] and v [T, K, Dv] in the model's dtype.
    """
    tokens = qkv.shape[0]
    q, k, v = torch.split(qkv, list(shape.splits), dim=-1)
    q = q.reshape(tokens, shape.num_heads, shape.head_dim)
    k = k.reshape(tokens, shape.num_kv_heads, shape.head_dim)
    v = v.reshape(tokens, shape.num_kv_heads, shape.head_dim_v)
    if shape.q_norm is not None:
        q = norm(q, shape.q_norm, shape.eps, shape.norm_offset)
    if shape.k_norm is not None:
        k = norm(k, shape.k_norm, shape.eps, shape.norm_offset)
    if table is not None:
        q = rotate(q, table, positions)
        k = rotate(k, table, positions)
    if cache is not None:
        store(cache, layer, k, v, slots)
    return q


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over two disjoint sets of keys: out [T, H, Dv], lse [T, H] float32 natural log.

    Both sets empty gives 0 and -inf.
    """
    top = torch.maximum(lse_a, lse_b)
    safe = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    wa, wb = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
    total = wa + wb
    share = torch.where(total > 0, total, torch.ones_like(total))
    # where, not a product: a set that is empty may hold anything, NaN included
    pa = torch.where((wa > 0)[..., None], out_a.float() * (wa / share)[..., None], 0.0)
    pb = torch.where((wb > 0)[..., None], out_b.float() * (wb / share)[..., None], 0.0)
    lse = torch.where(total > 0, safe + torch.log(share), torch.full_like(safe, -torch.inf))
    return (pa + pb).to(out_a.dtype), lse
