"""Dtypes by name, unit roundoffs, and the suite's own quantiser (none of the core's code)."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "bits", "dtype_of", "quantise", "same_bits", "unit_roundoff"]

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float32", "float16", "bfloat16", "float64", "int8",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "int32", "int64", "uint8", "bool",
    )
}  # fmt: skip

_INT_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_of(name: str) -> torch.dtype:
    return DTYPES[name]


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return float(torch.finfo(dtype).eps) / 2


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of ``x`` as integers, so that NaN equals NaN and -0 differs from 0."""
    return x if not x.dtype.is_floating_point else x.contiguous().view(_INT_VIEW[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(bits(a), bits(b)))


def quantise(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """float32 ``x`` / ``scale`` rounded to ``dtype``: int8 to even within ±127, fp8 saturating."""
    if dtype == torch.int8:
        return torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8)
    if dtype.itemsize == 1:
        top = torch.finfo(dtype).max
        return torch.clamp(x / scale, -top, top).to(dtype)
    return x.to(dtype)
