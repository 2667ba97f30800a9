"""Small conversions shared by the kernels' Python side."""

from __future__ import annotations

import torch

from dougong.hal import LayerCache

__all__ = ["DTYPES", "plane_views", "scale_values"]

#: ``DgDtype`` of a torch dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


def plane_views(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as views with dimensions b, n, h, d, whatever untiled layout they lie in."""
    spec, size = cache.spec, cache.block_size
    k = cache.layout.parsed["k"].canonical(cache.planes["k"], size, *spec.plane_dims("k"))
    if "v" in cache.planes:
        return k, cache.layout.parsed["v"].canonical(cache.planes["v"], size, *spec.plane_dims("v"))
    return k, k[..., : spec.head_dim_v]


def scale_values(scale: float | torch.Tensor) -> torch.Tensor:
    """A layer's scale as contiguous float32 [1] or [K]. A float32 tensor is used in place: later changes count."""
    if isinstance(scale, torch.Tensor):
        return scale.detach().to("cpu", torch.float32).reshape(-1).contiguous()
    return torch.tensor([float(scale)], dtype=torch.float32)
