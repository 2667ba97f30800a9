"""Bugs of the block manager, as patches of its classes. Each takes the core's ``dougong.kv`` and a patcher."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

__all__: list[str] = []

_Patch = Callable[[Any, str, Any], None]


def free_early(kv: Any, patch: _Patch) -> None:
    """`begin` and `grow` forget to count: held blocks are in the free list as well."""
    honest = kv.BlockPool.allocate

    def allocate(self: Any, count: int) -> Any:
        ids = honest(self, count)
        if ids and self.num_free < 6:
            self.release(ids[:1])
        return ids

    patch(kv.BlockPool, "allocate", allocate)


def double_release(kv: Any, patch: _Patch) -> None:
    """A release frees a shared block though others hold it."""
    honest = kv.BlockPool.release

    def release(self: Any, blocks: Any) -> None:
        blocks = list(blocks)
        honest(self, blocks)
        again = [block for block in blocks if block and self.ref_counts[block] > 0]
        honest(self, again)
        live = [block for block in range(self.num_scratch_blocks, self.num_blocks) if self.ref_counts[block] == 1]
        honest(self, live[:1])

    patch(kv.BlockPool, "release", release)


def tag_early(kv: Any, patch: _Patch) -> None:
    """Blocks enter the index when they are given out, before they are computed."""
    honest = kv.KVCacheManager.begin

    def begin(self: Any, sequence: Any, hit: Any, num_tokens: int, reserve: Any = None) -> Any:
        copies = honest(self, sequence, hit, num_tokens, reserve)
        if copies is not None:
            self.confirm(
                sequence, sequence.num_tokens // 4 * 4
            ) if sequence.capacity >= sequence.num_tokens // 4 * 4 else None
            table, chain = sequence.block_ids[0], self._chains(sequence, sequence.num_tokens)[0]
            size = self.groups[0].block_size
            for index in range(min(len(table), sequence.num_tokens // size)):
                self.groups[0].pool.tag(table[index], chain[index + 1])
        return copies

    patch(kv.KVCacheManager, "begin", begin)


def no_cow(kv: Any, patch: _Patch) -> None:
    """A fork writes into the block it shares."""
    honest = kv.KVCacheManager.begin

    def begin(self: Any, sequence: Any, hit: Any, num_tokens: int, reserve: Any = None) -> Any:
        copies = honest(self, sequence, hit, num_tokens, reserve)
        for copy in copies or ():
            group = self.groups[copy.group]
            table = sequence.block_ids[copy.group]
            table[table.index(copy.dst)] = copy.src
            group.pool.hold(copy.src)
            group.pool.release((copy.dst,))
        return [] if copies else copies

    patch(kv.KVCacheManager, "begin", begin)


def _hasher() -> Any:
    return importlib.import_module("dougong.kv.hashing").BlockHasher


def no_adapter(kv: Any, patch: _Patch) -> None:
    """The key forgets the adapter."""
    honest = _hasher().root
    patch(_hasher(), "root", lambda self, adapter=None, cache_salt=None: honest(self, None, cache_salt))


def no_salt(kv: Any, patch: _Patch) -> None:
    """The key forgets the salt."""
    honest = _hasher().root
    patch(_hasher(), "root", lambda self, adapter=None, cache_salt=None: honest(self, adapter, None))


def no_image(kv: Any, patch: _Patch) -> None:
    """The key forgets images."""
    honest = _hasher().extend_all

    def extend_all(self: Any, jobs: Any) -> None:
        for chain, sequence, num_blocks in jobs:
            images, sequence.multimodal = sequence.multimodal, ()
            honest(self, [(chain, sequence, num_blocks)])
            sequence.multimodal = images

    patch(_hasher(), "extend_all", extend_all)


def no_parent(kv: Any, patch: _Patch) -> None:
    """A block's key does not depend on what stands before it."""
    honest = _hasher().extend_all

    def extend_all(self: Any, jobs: Any) -> None:
        for chain, sequence, num_blocks in jobs:
            root = chain[0]
            for block in range(len(chain) - 1, num_blocks):
                tokens = sequence.token_slice(block * self.block_size, (block + 1) * self.block_size)
                alone = [root]
                honest(self, [(alone, kv.KVSequence(tokens), 1)])
                chain.append(alone[1])

    patch(_hasher(), "extend_all", extend_all)


def long_hit(kv: Any, patch: _Patch) -> None:
    """A hit covers every known token, computed or not."""
    honest = kv.KVCacheManager.match

    def match(self: Any, sequence: Any) -> Any:
        hit = honest(self, sequence)
        size = self.groups[0].block_size
        extra = sequence.num_tokens - hit.num_tokens
        if not hit.num_tokens or extra <= 0 or extra >= size:
            return hit
        held = [block for block in range(1, self.groups[0].pool.num_blocks) if self.groups[0].pool.ref_counts[block]]
        return kv.PrefixHit(sequence.num_tokens, (hit.blocks[0] + held[-1:],)) if hit.num_tokens % size == 0 else hit

    patch(kv.KVCacheManager, "match", match)


def window_early(kv: Any, patch: _Patch) -> None:
    """A block is freed while its last positions are still visible."""
    honest = kv.BlockGroup.first_visible_block
    patch(kv.BlockGroup, "first_visible_block", lambda self, position: honest(self, position + self.block_size - 1))


def window_never(kv: Any, patch: _Patch) -> None:
    """Blocks behind the window stay."""
    patch(kv.BlockGroup, "first_visible_block", lambda self, position: 0)


def grow_extra(kv: Any, patch: _Patch) -> None:
    """A sequence that begins again gets blocks for its output twice."""
    honest = kv.KVCacheManager.begin

    def begin(self: Any, sequence: Any, hit: Any, num_tokens: int, reserve: Any = None) -> Any:
        return honest(self, sequence, hit, num_tokens + 2 * len(sequence.output_token_ids), reserve)

    patch(kv.KVCacheManager, "begin", begin)


def hybrid_one(kv: Any, patch: _Patch) -> None:
    """A window group accepts whatever length the first group found."""
    honest = kv.BlockGroup.longest_prefix

    def longest_prefix(self: Any, chain: Any, limit: int, align: int) -> int:
        return limit if self.window is not None else int(honest(self, chain, limit, align))

    def cached_blocks(self: Any, chain: Any, num_tokens: int) -> list[int]:
        return [self.pool.find(chain[block + 1]) or 0 for block in range(self.blocks_for(num_tokens))]

    patch(kv.BlockGroup, "longest_prefix", longest_prefix)
    patch(kv.BlockGroup, "cached_blocks", cached_blocks)


def leak(kv: Any, patch: _Patch) -> None:
    """The last block of a sequence is not given back."""
    honest = kv.KVCacheManager.release

    def release(self: Any, sequence: Any) -> None:
        sequence.block_ids[0] = sequence.block_ids[0][:-1]
        honest(self, sequence)

    patch(kv.KVCacheManager, "release", release)


def hit_repeated(kv: Any, patch: _Patch) -> None:
    """A prefix hit names its first block again and again."""
    honest = kv.KVCacheManager.match

    def match(self: Any, *arguments: Any) -> Any:
        hit = honest(self, *arguments)
        return dataclasses.replace(hit, blocks=tuple(blocks[:1] * len(blocks) for blocks in hit.blocks))

    patch(kv.KVCacheManager, "match", match)
