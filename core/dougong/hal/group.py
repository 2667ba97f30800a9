"""Layers with like caches form a group: one block table, one pool, one attention kernel and plan."""

from __future__ import annotations

from dataclasses import dataclass

from dougong.hal.attention_spec import AttentionSpec
from dougong.hal.layout import KVLayout

__all__ = ["KVGroup", "Limits"]


@dataclass(frozen=True, kw_only=True)
class KVGroup:
    """A group of layers.

    ``manager_block`` is the number of tokens per block in the block manager, ``kernel_block`` in the kernel's
    table; the first is a multiple of the second (the batch's table is expanded when they differ).
    ``shares`` maps a layer to an earlier one whose cache it reads in place of its own.
    """

    index: int
    layers: tuple[int, ...]
    spec: AttentionSpec
    layout: KVLayout
    manager_block: int
    kernel_block: int
    shares: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.manager_block % self.kernel_block:
            raise ValueError(
                f"manager block {self.manager_block} is not a multiple of kernel block {self.kernel_block}"
            )

    @property
    def owners(self) -> tuple[int, ...]:
        """Layers that have a cache of their own."""
        shared = {layer for layer, _ in self.shares}
        return tuple(layer for layer in self.layers if layer not in shared)

    def bytes_per_block(self) -> int:
        """Bytes that one manager block takes over all the group's layers."""
        return self.spec.bytes_per_token(self.layout.planes) * self.manager_block * len(self.owners)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest batch that a kernel will ever be given; plans are sized by it."""

    max_rows: int
    max_tokens: int
    max_kv_len: int
    max_blocks: int
    """Width of the block table, in kernel blocks."""
