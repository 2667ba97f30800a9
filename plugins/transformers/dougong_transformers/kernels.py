"""The kernels behind ``attn_implementation="dougong"``: chosen once per device and kind of attention layer."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from dougong.errors import DougongError, KernelSelectionError
from dougong.hal import AttentionKernel, AttentionSpec, BatchView, Limits, Plan
from dougong.hal.embedding import attention_kernel

__all__ = ["Kernel", "kernel_for"]

#: Block size that ragged kernels are made with; they never see a block.
_ANY_BLOCK = 16


@dataclass
class Kernel:
    """An attention kernel with its plan, and what the plan was last made for."""

    attention: AttentionKernel
    limits: Limits
    plan: Plan
    owner: Any = None

    def plan_for(self, owner: Any, batch: BatchView) -> Plan:
        """The plan of ``batch``. ``owner`` stands for the batch: layers that bring the same one share the plan."""
        if self.owner is not owner:
            self.attention.plan(batch, self.plan)
            self.owner = owner
        return self.plan


class _Store(threading.local):
    """Kernels by what they compute. One store per thread, since a kernel's plan and workspace serve one stream."""

    def __init__(self) -> None:
        self.kernels: dict[tuple[torch.device, AttentionSpec, int], Kernel] = {}


_store = _Store()


def kernel_for(device: torch.device, spec: AttentionSpec, block: int, rows: int, tokens: int, keys: int) -> Kernel:
    """The kernel for a batch of at most ``rows`` rows, ``tokens`` queries and ``keys`` keys in a row.

    ``block``: tokens in a block of the paged cache; 0: K and V come without pages.

    Raises:
        ValueError: no installed kernel does this; the message gives each one's reason.
    """
    held = _store.kernels.get((device, spec, block))
    if held is not None:
        most = held.limits
        if rows <= most.max_rows and tokens <= most.max_tokens and keys <= most.max_kv_len:
            return held
        # Everything of a kernel's workspace is sized by its limits, so it grows as a vector does.
        rows, tokens, keys = max(rows, most.max_rows), max(tokens, most.max_tokens), max(keys, most.max_kv_len)
    limits = Limits(
        max_rows=_power(rows, 16),
        max_tokens=_power(tokens, 256),
        max_kv_len=_power(keys, 1024),
        max_blocks=-(-_power(keys, 1024) // (block or _ANY_BLOCK)),
    )
    try:
        attention, _ = attention_kernel(
            spec, block_size=block or _ANY_BLOCK, limits=limits, device=device, ragged=not block, strided=False
        )
    except KernelSelectionError as error:
        raise ValueError(f"`dougong` attention cannot run this layer. {error}") from error
    except DougongError as error:
        raise ValueError(f"`dougong` attention cannot be used: {error} Or use attn_implementation='sdpa'.") from error
    held = _store.kernels[device, spec, block] = Kernel(attention, limits, attention.new_plan())
    return held


def _power(n: int, least: int) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())
