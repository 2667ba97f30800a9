"""Activations to 8-bit floats, a scale per row, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["LARGEST", "quantize_rows"]

LARGEST = 448.0
"""The largest value of ``float8_e4m3fn``."""
_BLOCK = 4096


@triton.jit
def rows_kernel(x, q, scale, stride_x, I: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: its largest magnitude, then its values over the scale. Longer rows are read twice."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, I, BLOCK):
        value = tl.load(x + row * stride_x + start + i, mask=start + i < I, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(value))
    factor = tl.maximum(tl.max(top, 0), 1e-12) / TOP
    tl.store(scale + row, factor)
    for start in tl.static_range(0, I, BLOCK):
        ok = start + i < I
        value = tl.load(x + row * stride_x + start + i, mask=ok, other=0.0).to(tl.float32) / factor
        value = tl.minimum(tl.maximum(value, -TOP), TOP)
        tl.store(q + row * I + start + i, value.to(q.dtype.element_ty), mask=ok)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, I], its rows at any stride -> (q [T, I] float8_e4m3fn, scale [T, 1] float32) with x ≈ q * scale."""
    rows, size = x.shape
    q = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = min(_BLOCK, 1 << max(4, (size - 1).bit_length()))
        rows_kernel[(rows,)](
            x, q, scale, x.stride(0), I=size, TOP=LARGEST, BLOCK=block, num_warps=max(1, min(8, block // 512))
        )
    return q, scale
