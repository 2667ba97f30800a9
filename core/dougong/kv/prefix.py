"""A prefix hit: the cached blocks that a sequence can start from."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["NO_HIT", "PrefixHit"]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """``num_tokens`` positions whose KV exists, and per group the blocks that hold them.

    Where ``num_tokens`` ends inside a block, that last block is shared with others and is copied before
    the sequence writes into it (copy-on-write). Entries wholly behind a group's window are 0.
    """

    num_tokens: int = 0
    blocks: tuple[list[int], ...] = field(default=())
    generation: int = 0
    """Of the cache contents it was found in: see `KVCacheManager.reset_prefix_cache`."""


NO_HIT = PrefixHit()
