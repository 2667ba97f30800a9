"""What Intel's operators need to know of a step beside the batch, which queries see nothing; and the kernels' base."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dougong.hal import AttentionKernel, BatchView, LayerArgs, LayerCache, Limits, Plan
from dougong_kernels.ops.write import write as triton_write
from dougong_kernels.target import available

__all__ = ["BlindAttention", "BlindPlan", "head", "portable_write"]


def head(x: torch.Tensor, count: int) -> torch.Tensor:
    """``x[:count]``. Indexing would start torch's XPU runtime, which a CPU build lacks: the schemas are checked there,
    on fake tensors."""
    return x.narrow(0, 0, count)


class BlindPlan(Plan):
    """``blind`` [tokens, 1, 1] bool: queries that see nothing, whose answer the operators leave open. It is worked out
    on the device, so that it stays right in a captured graph."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.blind = torch.zeros(limits.max_tokens, 1, 1, dtype=torch.bool, device=device)


class BlindAttention(AttentionKernel):
    """A kernel whose only plan is which queries see nothing."""

    def new_plan(self) -> BlindPlan:
        return BlindPlan(self.limits, self.device.torch_device)

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, BlindPlan)
        into.batch = batch
        blind = batch.blind(self.spec, batch.groups[self.group.index].kv_len)
        into.blind[: batch.num_tokens].copy_(blind[:, None, None])


def portable_write(device: torch.device) -> Callable[..., None]:
    """The cache write for libraries that bring none: Triton's kernel, or the core's where Triton cannot run."""
    if not available(device):
        return triton_write

    def write(layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        cache.write_scaled(layer, k, v, slots)

    return write
