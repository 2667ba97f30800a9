"""What an attention layer computes: the part that never changes, and the part a layer brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch

__all__ = ["AttentionSpec", "LayerArgs"]

_KV_FEATURES = {
    torch.int8: "kv_int8",
    torch.float8_e4m3fn: "kv_fp8_e4m3",
    torch.float8_e5m2: "kv_fp8_e5m2",
    torch.float8_e4m3fnuz: "kv_fp8_e4m3fnuz",
}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What never changes about an attention layer. The semantics are those of the attention contract.

    ``window`` counts visible tokens, the query's own included. ``latent`` (MLA): one kv head whose first
    ``head_dim_v`` elements are also the value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int = 0
    """0 stands for ``head_dim``."""
    scale: float = 0.0
    """0 stands for 1/sqrt(head_dim)."""
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = field(default=cast(torch.dtype, None))
    """None stands for ``dtype``."""
    lse: bool = False
    latent: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads over {self.num_kv_heads} kv heads: not a whole ratio")
        if self.head_dim < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"head_dim={self.head_dim}, window={self.window}: both must be at least 1")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None")
        if not self.head_dim_v:
            put(self, "head_dim_v", self.head_dim)
        if not self.scale:
            put(self, "scale", self.head_dim**-0.5)
        if not self.kv_dtype:
            put(self, "kv_dtype", self.dtype)
        if self.latent and self.num_kv_heads != 1:
            raise ValueError("a latent cache has one kv head")

    @property
    def group_size(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    def plane_dims(self, plane: str) -> tuple[int, int]:
        """(heads, dim) of a cache plane."""
        if plane == "k":
            return self.num_kv_heads, self.head_dim
        if plane in ("v", "latent"):
            return self.num_kv_heads, self.head_dim_v
        if plane == "rope":
            return self.num_kv_heads, self.head_dim - self.head_dim_v
        raise ValueError(f"unknown cache plane {plane!r}")

    def features(self) -> frozenset[str]:
        """Names of all that goes beyond causal attention with equal head dims over a cache in the model's dtype."""
        names = set()
        if not self.causal:
            names.add("noncausal")
        if self.window is not None:
            names.add("window")
        if self.softcap is not None:
            names.add("softcap")
        for name in ("alibi", "sinks", "lse", "latent"):
            if getattr(self, name):
                names.add(name)
        if self.head_dim_v != self.head_dim and not self.latent:
            names.add("dv")
        if self.kv_dtype != self.dtype:
            names.add(_KV_FEATURES.get(self.kv_dtype, f"kv_{str(self.kv_dtype).removeprefix('torch.')}"))
        return frozenset(names)

    def bytes_per_token(self, planes: Any = ("k", "v")) -> int:
        """Bytes of cache that one token takes in one layer."""
        total = 0
        for plane in planes:
            heads, dim = self.plane_dims(plane)
            total += heads * dim * self.kv_dtype.itemsize
        return total


@dataclass(frozen=True)
class LayerArgs:
    """What one layer brings to attention.

    k_scale, v_scale: cached value times scale is the value (float, or a float32 tensor of one element).
    sinks: [H] float32 logits that join the denominator. slopes: [H] float32 ALiBi slopes.

    None of it changes: kernels may keep what they made of it. Other values are another object.
    """

    k_scale: float | torch.Tensor = 1.0
    v_scale: float | torch.Tensor = 1.0
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None

    @cached_property
    def host_scales(self) -> tuple[float, float]:
        """(k_scale, v_scale) as numbers of the host. Tensors are read from the device once, at the first use, which
        must not be inside a graph's capture: the run before it is soon enough."""
        return float(self.k_scale), float(self.v_scale)
