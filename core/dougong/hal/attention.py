"""The attention kernel that a backend brings. What it must mean is written in the attention contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dougong.hal.attention_spec import AttentionSpec, LayerArgs
from dougong.hal.batch import BatchView
from dougong.hal.cache import LayerCache, RaggedKV
from dougong.hal.group import KVGroup, Limits
from dougong.hal.layout import KVLayout

if TYPE_CHECKING:
    from dougong.hal.device import Device
    from dougong.hal.graph import Graph

__all__ = ["AttentionKernel", "AttentionQuery", "Plan", "Refusal"]


@dataclass(frozen=True)
class Refusal:
    """Why a kernel does not do what was asked; ``nearest`` is what it would do instead, if anything."""

    reason: str
    nearest: str = ""

    def __str__(self) -> str:
        return f"{self.reason} (nearest: {self.nearest})" if self.nearest else self.reason


@dataclass(frozen=True, kw_only=True)
class AttentionQuery:
    """What a kernel is asked to do.

    ``ragged``: K and V come without a cache. ``strided``: the cache is somebody else's memory, whose planes may have
    gaps or swapped axes; otherwise they are as ``Device.empty_cache`` makes them. ``max_kv_len``: no row will have more
    keys; None where that is not decided yet (the kernel hears of it in its Limits).
    """

    spec: AttentionSpec
    layout: KVLayout
    block_size: int
    ragged: bool = False
    batch_invariant: bool = False
    strided: bool = False
    max_kv_len: int | None = None

    def features(self) -> frozenset[str]:
        """What a kernel must have declared before it is asked."""
        own = {name for name in ("ragged", "strided") if getattr(self, name)}
        return self.spec.features() | own


class Plan:
    """What a kernel works out once per step and reads in every layer. Its device buffers keep their addresses."""

    batch: BatchView


class AttentionKernel(ABC):
    """One per (AttentionSpec, KVGroup): layers alike share it and its plan.

    Called on the engine's thread. ``plan`` may touch the host and allocate; ``run`` and ``write``, when the
    KernelSpec says they can be captured, allocate only from the current torch or graph pool, never synchronise
    and never branch on device data.
    """

    layouts: ClassVar[tuple[KVLayout, ...]] = ()
    """The caches it asks for, preferred first, each with the block sizes that it takes. Of the names in its KernelSpec,
    those that are not here it reads where another kernel asks for them."""

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        self.spec = spec
        self.group = group
        self.limits = limits
        self.device = device

    @classmethod
    @abstractmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        """Every reason against this query; empty means that the answer will be right. A refusal is always acceptable,
        a wrong answer never."""

    def new_plan(self) -> Plan:
        """A plan with buffers for the largest batch. A captured graph keeps the plan it was captured with."""
        return Plan()

    @abstractmethod
    def plan(self, batch: BatchView, into: Plan) -> None:
        """Work out ``batch`` into the plan's buffers. Outside capture; once per step."""

    @abstractmethod
    def run(
        self,
        plan: Plan,
        layer: LayerArgs,
        q: torch.Tensor,
        kv: LayerCache | RaggedKV,
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attention of one layer.

        q [T, H, D] in the spec's dtype, possibly a strided slice; out [T, H, Dv] is written in full;
        lse [T, H] float32 (natural log), where the spec says so. ``q`` and the cache are not changed.
        """

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        """Store k [T, K, D] and v [T, K, Dv] at ``slots`` [T] int64. Only those slots change."""
        cache.write_scaled(layer, k, v, slots)

    def update_graph(self, graph: Graph, plan: Plan) -> None:  # noqa: B027 - most kernels read device buffers
        """Bring a captured graph up to date with ``plan`` where lengths are baked in (KernelSpec.graph "update")."""

    @classmethod
    def tuned_block(cls, spec: AttentionSpec, layout: KVLayout, device: Device) -> int:
        """The block size this kernel likes best when the user names none."""
        return layout.default_block
