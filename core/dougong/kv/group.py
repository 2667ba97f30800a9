"""One KV group: layers with like caches, their pool, and which of its blocks a position can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dougong.errors import ConfigError
from dougong.kv.pool import BlockPool

__all__ = ["BlockGroup", "GroupSpec"]


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """What the manager must know of one KV group.

    Raises:
        ConfigError: a number is too small, or the pool cannot hold even one window.
    """

    block_size: int
    """Tokens per block."""
    num_blocks: int
    """Blocks in this group's own pool, the scratch blocks included."""
    num_scratch_blocks: int = 1
    """Ids 0 … num_scratch_blocks - 1 are never handed out; padding token i writes scratch slot i."""
    window: int | None = None
    """Visible tokens, the query's own included; None means all (full attention)."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size}: a block holds at least 1 token.")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window}: a window sees at least 1 token; None means no window.")


class BlockGroup:
    """A `GroupSpec` with its pool and the arithmetic of its window."""

    __slots__ = ("block_size", "chain", "index", "pool", "window")

    def __init__(self, index: int, spec: GroupSpec, chain: int) -> None:
        self.index = index
        self.block_size = spec.block_size
        self.window = spec.window
        self.chain = chain
        """Which of a sequence's hash chains names this group's blocks."""
        self.pool = BlockPool(spec.num_blocks, spec.num_scratch_blocks)
        if spec.window is not None and self.window_blocks > self.pool.num_usable:
            raise ConfigError(
                f"window={spec.window} with block_size={spec.block_size} needs {self.window_blocks} blocks for one "
                f"sequence, the group has {self.pool.num_usable} usable: raise num_blocks to at least "
                f"{self.window_blocks + spec.num_scratch_blocks}."
            )

    @property
    def window_blocks(self) -> int:
        """Most blocks that ``window`` consecutive positions can touch."""
        assert self.window is not None
        return (self.window + self.block_size - 2) // self.block_size + 1

    def first_visible_block(self, position: int) -> int:
        """Index of the first block that a query at ``position`` can see."""
        if self.window is None or position < self.window:
            return 0
        return (position - self.window + 1) // self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Table entries for ``num_tokens`` positions."""
        return -(-num_tokens // self.block_size)

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks held at once while ``num_tokens`` positions are computed ``chunk`` at a time."""
        blocks = self.blocks_for(num_tokens)
        if self.window is None:
            return blocks
        return min(blocks, self.window_blocks + self.blocks_for(chunk))

    def longest_prefix(self, chain: Sequence[bytes], limit: int, align: int) -> int:
        """Most tokens <= ``limit`` whose visible blocks are all cached: a multiple of ``align``, or ``limit``.

        ``chain`` is the sequence's root and block hashes and must name every block that ``limit`` touches.
        """
        size, find = self.block_size, self.pool.find
        if self.window is None:
            block, end = 0, -(-limit // size)
            while block < end and find(chain[block + 1]) is not None:
                block += 1
            return limit if block == end else block * size // align * align
        while limit > 0:
            block = -(-limit // size) - 1
            first = self.first_visible_block(limit)
            while block >= first and find(chain[block + 1]) is not None:
                block -= 1
            if block < first:
                return limit
            limit = block * size // align * align
        return 0

    def cached_blocks(self, chain: Sequence[bytes], num_tokens: int) -> list[int]:
        """The table of a hit of ``num_tokens`` that `longest_prefix` has found valid."""
        first = self.first_visible_block(num_tokens)
        table = [0] * first
        for block in range(first, self.blocks_for(num_tokens)):
            found = self.pool.find(chain[block + 1])
            assert found is not None, "a block vanished between finding a hit and taking it"
            table.append(found)
        return table
