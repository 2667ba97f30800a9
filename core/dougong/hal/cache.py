"""One layer's paged KV cache, and K and V without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dougong.hal.attention_spec import AttentionSpec, LayerArgs
from dougong.hal.layout import KVLayout

__all__ = ["KVPlanes", "LayerCache", "RaggedKV", "allocate_cache", "convert_blocks", "copy_blocks"]

KVPlanes = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: named planes that lie in memory as ``layout`` says, with any strides it allows.

    ``k`` and ``v`` are the planes of those names. With a latent cache kept in one plane, ``v`` is the view of
    ``k``'s first ``Dv`` elements.
    """

    planes: KVPlanes
    layout: KVLayout
    block_size: int
    spec: AttentionSpec
    k: torch.Tensor = field(init=False, repr=False)
    v: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Plain attributes: they are read once per layer and step.
        first = "k" if "k" in self.planes else "latent"
        object.__setattr__(self, "k", self.planes[first])
        if "v" in self.planes:
            value = self.planes["v"]
        elif "k" in self.planes:
            value = self.planes["k"][..., : self.spec.head_dim_v]
        else:
            value = self.planes["latent"]
        object.__setattr__(self, "v", value)

    @property
    def num_blocks(self) -> int:
        return self.k.shape[0]

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather tokens ``slots`` [T] int64 -> K [T, K, D] and V [T, K, Dv] as stored (unscaled)."""
        got = {
            name: self.layout.parsed[name].read(plane, slots, self.block_size, *self.spec.plane_dims(name))
            for name, plane in self.planes.items()
        }
        if "v" in got:
            return got["k"], got["v"]
        if "k" in got:
            return got["k"], got["k"][..., : self.spec.head_dim_v]
        return torch.cat((got["latent"], got["rope"]), dim=-1), got["latent"]

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Scatter stored-dtype K [T, K, D] and V [T, K, Dv]; only the named slots change."""
        split = self.spec.head_dim_v
        values = {"k": k, "v": v, "latent": k[..., :split], "rope": k[..., split:]}
        for name, plane in self.planes.items():
            self.layout.parsed[name].write(plane, slots, values[name], self.block_size)

    def write_scaled(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """``write`` after dividing by the layer's scales and rounding to the cache's dtype."""
        dtype = self.spec.kv_dtype
        self.write(slots, quantize(k, layer.k_scale, dtype), quantize(v, layer.v_scale, dtype))


def quantize(x: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x / scale`` in ``dtype``: int8 rounds to even and saturates at ±127, fp8 saturates at its largest value."""
    if x.dtype == dtype:
        return x
    scaled = x.float() / scale
    if dtype == torch.int8:
        return scaled.round().clamp(-127, 127).to(dtype)
    if dtype.is_floating_point and dtype.itemsize == 1:
        top = torch.finfo(dtype).max
        scaled = scaled.clamp(-top, top)
    return scaled.to(dtype)


@dataclass(frozen=True)
class RaggedKV:
    """K and V without a cache (encoders; a host's prefill): row i owns ``cu_k[i]`` to ``cu_k[i+1]``.

    k [Tk, K, D], v [Tk, K, Dv], any token and head strides; cu_k [B+1] int32 on the device;
    host_cu_k [B+1] int32 on the host.
    """

    k: torch.Tensor
    v: torch.Tensor
    cu_k: torch.Tensor
    host_cu_k: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Keys of each row, [B] int32 on the device; ``host_lengths`` on the host."""
        return self.cu_k[1:] - self.cu_k[:-1]

    @property
    def host_lengths(self) -> torch.Tensor:
        return self.host_cu_k[1:] - self.host_cu_k[:-1]


def allocate_cache(
    spec: AttentionSpec, layout: KVLayout, blocks: int, block_size: int, device: torch.device | str
) -> LayerCache:
    """An empty (uninitialised) cache of ``blocks`` blocks.

    Raises:
        ValueError: the layout cannot hold such blocks, or bounds the element count below this.
    """
    planes = {}
    for name, parsed in layout.parsed.items():
        heads, dim = spec.plane_dims(name)
        bound = layout.max_blocks(block_size, heads, dim)
        if bound is not None and blocks > bound:
            raise ValueError(
                f"{blocks} blocks of {block_size} tokens: layout {layout.name} allows at most {bound} "
                f"({layout.max_elements} elements in a plane)"
            )
        shape = parsed.shape(blocks, block_size, heads, dim, spec.kv_dtype.itemsize)
        planes[name] = torch.empty(shape, dtype=spec.kv_dtype, device=device)
    return LayerCache(planes, layout, block_size, spec)


def copy_blocks(caches: Sequence[LayerCache], source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy blocks ``source`` [C] int64 onto ``target`` [C] int64 in every layer. No target is also a source."""
    for cache in caches:
        for plane in cache.planes.values():
            plane.index_copy_(0, target, plane.index_select(0, source))


def convert_blocks(
    source: LayerCache, source_blocks: torch.Tensor, target: LayerCache, target_blocks: torch.Tensor
) -> None:
    """Copy the tokens of ``source_blocks`` into ``target_blocks``, between any two layouts and devices, bit-exact.

    Block ids are [C] and [C'] int64 on the respective cache's device; C·N must equal C'·N'.
    """
    if source.spec.kv_dtype != target.spec.kv_dtype:
        raise ValueError(f"dtypes differ: {source.spec.kv_dtype} and {target.spec.kv_dtype}; a conversion is bit-exact")
    from_slots = _slots(source_blocks, source.block_size)
    to_slots = _slots(target_blocks, target.block_size)
    if from_slots.numel() != to_slots.numel():
        raise ValueError(f"{from_slots.numel()} tokens cannot fill {to_slots.numel()} slots")
    k, v = source.read(from_slots)
    where = target.k.device
    target.write(to_slots, k.to(where), v.to(where))


def _slots(blocks: torch.Tensor, block_size: int) -> torch.Tensor:
    offsets = torch.arange(block_size, device=blocks.device, dtype=torch.int64)
    return (blocks.to(torch.int64)[:, None] * block_size + offsets).flatten()
