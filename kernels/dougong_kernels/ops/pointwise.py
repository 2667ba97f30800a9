"""Norms, gated activations and the LSE merge."""

from __future__ import annotations

import torch

from dougong_kernels.launch import Launcher, signature
from dougong_kernels.ops.support import supports
from dougong_kernels.target import early_start
from dougong_kernels.triton.pointwise import gated_kernel, merge_kernel, rms_norm_kernel

__all__ = ["add_rms_norm", "gelu_tanh_mul", "merge_lse", "rms_norm", "silu_mul"]

_NORM, _GATED, _MERGE = Launcher(rms_norm_kernel), Launcher(gated_kernel), Launcher(merge_kernel)


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., E] in any row stride -> new memory."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        _norm(flat, flat, out, flat, weight, eps, offset, (flat.stride(0), 0, size, 0), add=False)
    return out.view(x.shape)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum goes to ``residual``'s memory and the norm to ``x``'s, where they are plain; else to new memory."""
    size = x.shape[-1]
    if not (x.is_contiguous() and residual.is_contiguous()):
        x, residual = x.contiguous(), residual.contiguous()
    rows = x.numel() // size if size else 0
    if rows:
        _norm(x, residual, x, residual, weight, eps, offset, (size, size, size, size), add=True)
    return x, residual


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    strides: tuple[int, int, int, int],
    *,
    add: bool,
) -> None:
    """``strides``: those of a row in x, residual, out and total."""
    size, early = x.shape[-1], early_start(x.device)
    block = _pow2(size)
    constants = size, block, add, offset != 0, bool(early)
    _NORM(
        (constants, strides, signature(x, residual, out, total, weight), x.device.index), (x.numel() // size, 1, 1),
        (x, residual, out, total, weight, float(eps), float(offset), *strides, *constants),
        {"num_warps": _warps(block), **early},
    )  # fmt: skip


def _gated(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    size = gate_up.shape[-1] // 2
    flat = gate_up.reshape(-1, 2 * size)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.empty(flat.shape[0], size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024 if out.numel() >= 1 << 18 else 256, _pow2(size))
        early = early_start(out.device)
        stride, constants = flat.stride(0), (size, gelu, block, bool(early))
        _GATED(
            (constants, stride, signature(flat, out), out.device.index), (out.shape[0], -(-size // block), 1),
            (flat, out, stride, *constants), {"num_warps": max(1, block // 256), **early},
        )  # fmt: skip
    return out.view(*gate_up.shape[:-1], size)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2I] -> silu(gate) * up, [..., I]."""
    return _gated(gate_up, gelu=False)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2I] -> gelu_tanh(gate) * up, [..., I]."""
    return _gated(gate_up, gelu=True)


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, H, Dv] with any token and head strides, lse [T, H] float32 -> merged, new memory."""
    tokens, heads, dim = out_a.shape
    out = torch.empty(tokens, heads, dim, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=out_a.device)
    out_a, out_b = (x if x.stride(-1) == 1 else x.contiguous() for x in (out_a, out_b))
    lse_a, lse_b = (x if x.stride(-1) == 1 else x.contiguous() for x in (lse_a, lse_b))
    if tokens:
        block = _pow2(dim)
        constants = heads, dim, block
        tensors = out_a, lse_a, out_b, lse_b, out, lse
        strides = *out_a.stride()[:2], *out_b.stride()[:2], lse_a.stride(0), lse_b.stride(0)
        _MERGE(
            (constants, strides, signature(*tensors), out.device.index), (tokens * heads, 1, 1),
            (*tensors, *strides, *constants), {"num_warps": max(1, min(4, block // 64))},
        )  # fmt: skip
    return out, lse


for _op in (rms_norm, add_rms_norm, silu_mul, gelu_tanh_mul, merge_lse):
    _op.supports = supports  # type: ignore[attr-defined]
