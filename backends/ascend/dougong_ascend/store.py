"""Writing keys and values into the cache through the vendor's scatter operators."""

from __future__ import annotations

import torch

from dougong.errors import KernelSelectionError
from dougong.hal import LayerArgs, LayerCache, quantize
from dougong_ascend.sdk import INT_MAX

__all__ = ["STORED", "check_planes", "store", "store_scaled"]

#: Layouts that the operators write.
STORED = ("nhd", "hnd", "latent_rope", "latent_rope_nz16", "nz16")


def check_planes(cache: LayerCache) -> None:
    """Refuse planes that the operators do not take.

    Raises:
        KernelSelectionError: a plane has gaps, or too many elements.
    """
    for name, plane in cache.planes.items():
        if not plane.is_contiguous() or plane.numel() > INT_MAX:
            raise KernelSelectionError(
                f"cache plane {name!r} of shape {tuple(plane.shape)} and strides {plane.stride()}: the operators take "
                f"contiguous planes of at most {INT_MAX} elements. Allocate each plane by itself (Device.empty_cache), "
                "with fewer blocks."
            )


def store(cache: LayerCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Store k [T, K, D] and v [T, K, Dv] at ``slots`` [T] int64. The operators take contiguous inputs only."""
    if k.shape[0] == 0:
        return
    check_planes(cache)
    name = cache.layout.name
    if name == "nz16":
        torch.ops.atb._npu_reshape_and_cache(k.contiguous(), v.contiguous(), cache.k, cache.v, slots.to(torch.int32))
        return
    if name in ("latent_rope", "latent_rope_nz16"):
        split = cache.spec.head_dim_v
        first, second = k[..., :split].contiguous(), k[..., split:].contiguous()
        latent, rope = cache.planes["latent"], cache.planes["rope"]
        if name == "latent_rope":
            _scatter(first, second, latent, rope, slots)
        else:  # to this operator, heads and tiles are one dimension
            _scatter(first, second, latent.flatten(1, 2), rope.flatten(1, 2), slots, "PA_NZ")
    elif name == "hnd":
        _scatter_heads_out(cache, k, v, slots)
    else:
        _scatter(k.contiguous(), v.contiguous(), cache.k, cache.v, slots)


def store_scaled(cache: LayerCache, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """As ``store``, of values that the layer's scales still divide where the cache is int8."""
    dtype = cache.spec.kv_dtype
    store(cache, quantize(k, layer.k_scale, dtype), quantize(v, layer.v_scale, dtype), slots)


def _scatter(
    k: torch.Tensor,
    v: torch.Tensor,
    k_plane: torch.Tensor,
    v_plane: torch.Tensor,
    slots: torch.Tensor,
    mode: str = "Norm",
) -> None:
    torch.ops.npu.npu_scatter_pa_kv_cache(k, v, k_plane, v_plane, slots, cache_mode=mode)


def _scatter_heads_out(cache: LayerCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Heads outside a block: to the operator, each (block, head) is a block of its own with one head."""
    heads, size = cache.spec.num_kv_heads, cache.block_size
    block = torch.div(slots, size, rounding_mode="floor")
    head = torch.arange(heads, device=slots.device, dtype=slots.dtype)
    spread = (block[:, None] * heads + head) * size + (slots - block * size)[:, None]
    k_plane, v_plane = (plane.flatten(0, 1).unsqueeze(2) for plane in (cache.k, cache.v))
    _scatter(
        k.reshape(-1, 1, k.shape[-1]).contiguous(), v.reshape(-1, 1, v.shape[-1]).contiguous(),
        k_plane, v_plane, spread.flatten(),
    )  # fmt: skip
