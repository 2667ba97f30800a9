"""What a forward needs of one step. Made once by the runner and reused: reading an attribute is all it costs."""

from __future__ import annotations

import torch

from dougong.hal import AttentionKernel, BatchView, Collectives, LayerCache, OpTable, Plan, SingleRank

__all__ = ["StepContext"]


class StepContext:
    """The step's batch and where everything is.

    ops          functional ops of the device
    batch        the step's BatchView (the runner replaces it each step)
    kernels      by KV group: the attention kernel
    plans        by KV group: the plan of this step
    slots        by KV group: [T] int64, where the new tokens' K and V go
    caches       by layer: that layer's cache (of the layer it reads from, where caches are shared)
    collectives  communication between the ranks of this model
    """

    __slots__ = ("batch", "caches", "collectives", "kernels", "ops", "plans", "slots")

    def __init__(
        self,
        ops: OpTable,
        kernels: list[AttentionKernel],
        plans: list[Plan],
        caches: list[LayerCache],
        collectives: Collectives | None = None,
    ) -> None:
        self.ops = ops
        self.kernels = kernels
        self.plans = plans
        self.caches = caches
        self.collectives = SingleRank() if collectives is None else collectives
        self.slots: list[torch.Tensor] = []
        self.batch: BatchView | None = None

    def set_batch(self, batch: BatchView) -> None:
        """Take a step's batch: its slots are those of its groups."""
        self.batch = batch
        self.slots = [group.slots for group in batch.groups]
