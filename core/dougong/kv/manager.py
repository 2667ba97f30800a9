"""`KVCacheManager`: block tables for sequences, prefix hits, copy-on-write, windows."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dougong.errors import ConfigError
from dougong.kv.group import BlockGroup, GroupSpec
from dougong.kv.hashing import BlockHasher
from dougong.kv.pool import IntegrityError
from dougong.kv.prefix import NO_HIT, PrefixHit
from dougong.kv.sequence import NEVER, KVSequence

__all__ = ["BlockCopy", "FreedEntries", "KVCacheManager", "KVCacheStats"]


class BlockCopy(NamedTuple):
    """Copy block ``src`` onto block ``dst`` in every layer of ``group``, before the step's forward."""

    group: int
    src: int
    dst: int


class FreedEntries(NamedTuple):
    """Table entries ``first … first + num_entries - 1`` of ``group`` fell behind the window and are 0 now."""

    group: int
    first: int
    num_entries: int


@dataclass(frozen=True, kw_only=True)
class KVCacheStats:
    """Counters since the start (``prefix_*``, ``evictions``) and the present state of all groups together."""

    usable_blocks: int
    free_blocks: int
    """Blocks nobody holds, cached ones included."""
    cached_blocks: int
    usage: float
    """Held share of the fullest group, 0 to 1."""
    prefix_queries: int
    """Tokens of sequences that looked for a prefix."""
    prefix_hits: int
    """Tokens of those that were found."""
    evictions: int


class KVCacheManager:
    """One pool and one prefix index per group; a prefix hit is the longest that is valid in every group.

    The life of a sequence: `match` finds cached blocks (or `share` another sequence's), `begin` takes them
    and allocates the rest, `grow` adds blocks while tokens are computed, `confirm` says which positions have
    been computed (full blocks enter the index, blocks behind a window are freed), `release` gives all back.
    `flush_copies` ends a step.

    Safe without waiting for the device, if it runs steps in the order in which they were planned (one stream):
    a block given back may be handed out again at once, because the step that writes the new content comes
    after every step that reads the old. Only positions that a finished step computed enter the index.

    Args:
        groups: one spec per KV group; block sizes may differ.
        enable_prefix_caching: look up and keep the KV of full blocks.
        hash_key: key of the block hashes; by default random, so that block names cannot be guessed.
        model_id: identity of the model and of all else that changes KV for every sequence alike.

    Raises:
        ConfigError: no group, or a spec that cannot work.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        *,
        enable_prefix_caching: bool = True,
        hash_key: bytes | None = None,
        model_id: str = "",
    ) -> None:
        if not groups:
            raise ConfigError("KVCacheManager got no groups: give one GroupSpec per group of layers.")
        sizes = sorted({spec.block_size for spec in groups})
        self.groups = tuple(BlockGroup(i, spec, sizes.index(spec.block_size)) for i, spec in enumerate(groups))
        self.enable_prefix_caching = enable_prefix_caching
        self.has_windows = any(spec.window is not None for spec in groups)
        key = secrets.token_bytes(32) if hash_key is None else hash_key
        self.model_id = model_id
        self._hashers = tuple(BlockHasher(size, key, model_id) for size in sizes)
        self._align = math.lcm(*sizes)
        self._single = self.groups[0] if len(self.groups) == 1 and not self.has_windows else None
        self._generation = 1
        self._pinned: list[tuple[BlockGroup, int]] = []
        self._unnamed: dict[KVSequence, int] = {}
        """Sequences with full blocks that are not in the index yet, and how many of their positions are confirmed."""
        self.prefix_queries = 0
        self.prefix_hits = 0

    # -- what there is -----------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Free blocks of all groups together; cached ones that nobody holds count as free."""
        return sum(group.pool.num_free for group in self.groups)

    @property
    def usage(self) -> float:
        """Held share of the fullest group's usable blocks, 0 to 1."""
        return max(1.0 - group.pool.num_free / group.pool.num_usable for group in self.groups)

    @property
    def capacity_tokens(self) -> int:
        """Positions that one sequence alone can have in the cache."""
        full = [g.pool.num_usable * g.block_size for g in self.groups if g.window is None]
        return min(full) if full else NEVER

    @property
    def one_step_capacity_tokens(self) -> int:
        """Positions of one sequence that a single step can compute: there a window frees nothing."""
        return min(g.pool.num_usable * g.block_size for g in self.groups)

    def stats(self) -> KVCacheStats:
        """A snapshot. O(groups), and the names of blocks that were put off."""
        self._index()
        return KVCacheStats(
            usable_blocks=sum(g.pool.num_usable for g in self.groups),
            free_blocks=self.num_free_blocks,
            cached_blocks=sum(g.pool.num_cached for g in self.groups),
            usage=self.usage,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            evictions=sum(g.pool.num_evictions for g in self.groups),
        )

    def describe(self) -> dict[str, object]:
        """Plain values for a report such as ``dougong doctor``."""
        return {
            "prefix_caching": self.enable_prefix_caching,
            "capacity_tokens": None if self.capacity_tokens == NEVER else self.capacity_tokens,
            "usage": round(self.usage, 4),
            "groups": [
                {
                    "block_size": g.block_size,
                    "usable_blocks": g.pool.num_usable,
                    "scratch_blocks": g.pool.num_scratch_blocks,
                    "free_blocks": g.pool.num_free,
                    "cached_blocks": g.pool.num_cached,
                    "window": g.window,
                }
                for g in self.groups
            ],
        }

    # -- starting a sequence -----------------------------------------------------------------------------

    def match(self, sequence: KVSequence) -> PrefixHit:
        """The longest cached prefix of the known tokens that is valid in every group. Takes nothing yet.

        The last known token is never part of it: computing it gives the logits to sample from. If all of
        the tokens' blocks are cached, the hit ends one token early, inside the last block, and `begin`
        copies that block.
        """
        if not self.enable_prefix_caching:
            return NO_HIT
        self._index()
        total = sequence.num_tokens
        align = self._align
        chains = self._chains(sequence, total // align * align)
        limit = total - 1 if total % align == 0 else total // align * align
        settled = -1
        while limit > 0 and limit != settled:
            # Every group may shorten the hit, which the groups before it must then accept again: a window
            # that saw the end of a longer prefix may miss the end of a shorter one.
            settled = limit
            for group in self.groups:
                limit = group.longest_prefix(chains[group.chain], limit, align)
        if limit <= 0:
            return NO_HIT
        tables = tuple(g.cached_blocks(chains[g.chain], limit) for g in self.groups)
        return PrefixHit(limit, tables, self._generation)

    def share(self, source: KVSequence, num_tokens: int) -> PrefixHit | None:
        """The first ``num_tokens`` positions of ``source`` as a hit for a sequence with the same tokens.

        Works without the prefix cache, and before the positions are confirmed: a step planned earlier than
        the one that uses the hit must compute them. None if ``source`` has freed a block that is needed.
        """
        if source.capacity < num_tokens:
            return None
        tables: list[list[int]] = []
        for group in self.groups:
            first = group.first_visible_block(num_tokens)
            table = source.block_ids[group.index][first : group.blocks_for(num_tokens)]
            if 0 in table:
                return None
            tables.append([0] * first + table)
        return PrefixHit(num_tokens, tuple(tables), source.generation)

    def shorten(self, hit: PrefixHit) -> PrefixHit:
        """``hit`` without a partly used last block, for when there is no block to copy that one to."""
        length = hit.num_tokens // self._align * self._align
        if not length:
            return NO_HIT
        tables: list[list[int]] = []
        for group in self.groups:
            first = group.first_visible_block(length)
            table = hit.blocks[group.index][first : group.blocks_for(length)]
            if 0 in table:
                return NO_HIT
            tables.append([0] * first + table)
        return PrefixHit(length, tuple(tables), hit.generation)

    def begin(
        self, sequence: KVSequence, hit: PrefixHit, num_tokens: int, reserve: Sequence[int] | None = None
    ) -> list[BlockCopy] | None:
        """Give ``sequence`` the blocks of ``hit`` and new ones up to position ``num_tokens`` (exclusive).

        The copies must run before the forward of the step being planned; their sources stay held until
        `flush_copies`. Returns None, having changed nothing, if group g would keep fewer than ``reserve[g]``
        free blocks.
        """
        start = hit.num_tokens
        for group in self.groups:
            refs = group.pool.ref_counts
            held = hit.blocks[group.index] if start else ()
            copied = 1 if start % group.block_size else 0
            need = group.blocks_for(num_tokens) - len(held) + copied
            need += sum(1 for block in held if block and not refs[block])
            if need + (reserve[group.index] if reserve else 0) > group.pool.num_free:
                return None
        copies: list[BlockCopy] = []
        tables: list[list[int]] = []
        for group in self.groups:
            pool = group.pool
            table = list(hit.blocks[group.index]) if start else []
            for block in table:
                if block:
                    pool.hold(block)
            copied = 1 if start % group.block_size else 0
            fresh = pool.allocate(group.blocks_for(num_tokens) - len(table) + copied)
            assert fresh is not None, "counted above"
            if copied:
                source = table.pop()
                self._pinned.append((group, source))
                copies.append(BlockCopy(group.index, source, fresh[0]))
            tables.append(table + fresh)
        sequence.block_ids = tables
        sequence.capacity = min(len(t) * g.block_size for t, g in zip(tables, self.groups, strict=True))
        sequence.num_dropped = [group.first_visible_block(start) for group in self.groups]
        # Blocks shared with a sequence still in flight may be untagged, so tagging starts over at the first
        # block that is there; a tagged block is skipped at little cost.
        sequence.num_tagged = list(sequence.num_dropped)
        sequence.generation = hit.generation if start else self._generation
        self._schedule_confirm(sequence, start)
        return copies

    def count_prefix(self, queried: int, hit: int) -> None:
        """Add one admission to the hit-rate counters (tokens)."""
        self.prefix_queries += queried
        self.prefix_hits += hit

    def flush_copies(self) -> None:
        """Let go of the copies' sources. Call once a step has been planned, before the next is."""
        if self._pinned:
            for group, block in self._pinned:
                group.pool.release((block,))
            self._pinned.clear()

    # -- KV from elsewhere ---------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of the cache contents; see `reset_prefix_cache`."""
        return self._generation

    def lend(self, group: int, count: int, keep: PrefixHit = NO_HIT) -> list[int] | None:
        """``count`` free blocks of ``group`` for KV that was computed elsewhere; `adopt` gives them back.

        None, having changed nothing, if fewer are free. The blocks of ``keep`` are not among them.
        """
        pool = self.groups[group].pool
        held = [block for block in keep.blocks[group] if block] if keep.num_tokens else []
        for block in held:
            pool.hold(block)
        lent = pool.allocate(count)
        pool.release(reversed(held))
        return lent

    def adopt(self, sequence: KVSequence, group: int, first: int, blocks: Sequence[int], count: int) -> None:
        """The first ``count`` of ``blocks`` hold the KV of ``sequence``'s table entries from ``first`` on: they
        enter the index under its names. All are free from now on, the indexed ones findable until they are reused.
        """
        one = self.groups[group]
        if count:
            chain = self._chains(sequence, (first + count) * one.block_size)[one.chain]
            for block, link in zip(blocks[:count], chain[first + 1 :]):
                one.pool.tag(block, link)
        one.pool.release(reversed(blocks))

    # -- while it runs -----------------------------------------------------------------------------------

    def grow(self, sequence: KVSequence, num_tokens: int) -> list[tuple[int, int, list[int]]] | None:
        """Blocks for positions below ``num_tokens``: (group, first table entry, new ids) for each that grew.

        None, having changed nothing, if a group lacks free blocks. Never more than needed: at most the last
        block of a sequence is partly empty.
        """
        single = self._single
        if single is not None:
            table = sequence.block_ids[0]
            first = len(table)
            need = -(-num_tokens // single.block_size) - first
            if need <= 0:
                return []
            fresh = single.pool.allocate(need)
            if fresh is None:
                return None
            table += fresh
            sequence.capacity = len(table) * single.block_size
            return [(0, first, fresh)]
        needs = [g.blocks_for(num_tokens) - len(sequence.block_ids[g.index]) for g in self.groups]
        if any(need > g.pool.num_free for need, g in zip(needs, self.groups, strict=True)):
            return None
        grown: list[tuple[int, int, list[int]]] = []
        for need, group in zip(needs, self.groups, strict=True):
            if need > 0:
                table = sequence.block_ids[group.index]
                fresh = group.pool.allocate(need)
                assert fresh is not None, "counted above"
                grown.append((group.index, len(table), fresh))
                table += fresh
        sequence.capacity = min(len(t) * g.block_size for t, g in zip(sequence.block_ids, self.groups, strict=True))
        return grown

    def reach(self, sequence: KVSequence) -> int:
        """Positions that ``sequence`` could cover with all blocks now free."""
        return min((len(sequence.block_ids[g.index]) + g.pool.num_free) * g.block_size for g in self.groups)

    def confirm(self, sequence: KVSequence, num_tokens: int) -> Sequence[FreedEntries]:
        """The first ``num_tokens`` positions are computed, and their tokens known.

        Their full blocks enter the prefix index before anybody can ask for them. Blocks wholly behind the window of
        position ``num_tokens`` are given back and their table entries become 0. No effect unless
        ``num_tokens > sequence.confirm_at``.
        """
        if num_tokens <= sequence.confirm_at:
            return ()
        if self.enable_prefix_caching and sequence.generation == self._generation:
            self._unnamed[sequence] = num_tokens
        if self._single is not None:
            size = self._single.block_size
            sequence.confirm_at = num_tokens // size * size + size - 1
            return ()
        freed: list[FreedEntries] = []
        for group in self.groups:
            if group.window is None:
                continue
            table = sequence.block_ids[group.index]
            keep = min(group.first_visible_block(num_tokens), len(table))
            first = sequence.num_dropped[group.index]
            if keep > first:
                self._index()
                group.pool.release(reversed(table[first:keep]))
                table[first:keep] = [0] * (keep - first)
                sequence.num_dropped[group.index] = keep
                freed.append(FreedEntries(group.index, first, keep - first))
        self._schedule_confirm(sequence, num_tokens)
        return freed

    def release(self, sequence: KVSequence) -> None:
        """Give back all blocks. What is in the index stays findable until its block is reused."""
        if sequence in self._unnamed:
            self._index()
        for group, table in zip(self.groups, sequence.block_ids):
            group.pool.release(reversed(table))
        sequence.block_ids = []
        sequence.capacity = 0
        sequence.confirm_at = NEVER

    def reset_prefix_cache(self) -> None:
        """Forget all cached KV, for example after the weights changed.

        Sequences that hold blocks keep them; what they hold or compute until released never enters the index.
        """
        for group in self.groups:
            group.pool.clear_tags()
        self._unnamed.clear()
        self._generation += 1

    def check_integrity(self, sequences: Iterable[KVSequence] | None = None) -> None:
        """Raise `IntegrityError` if the books are wrong. With all living ``sequences``, leaks are found too."""
        for group in self.groups:
            group.pool.check_integrity()
        if sequences is None:
            return
        counts = [[0] * group.pool.num_blocks for group in self.groups]
        for group, block in self._pinned:
            counts[group.index][block] += 1
        for sequence in sequences:
            for group, table in zip(self.groups, sequence.block_ids):
                if len(table) * group.block_size < sequence.capacity:
                    raise IntegrityError(f"capacity {sequence.capacity} is more than its table of {len(table)} blocks")
                for block in table:
                    counts[group.index][block] += 1
        for group in self.groups:
            scratch = group.pool.num_scratch_blocks
            if counts[group.index][scratch:] != group.pool.ref_counts[scratch:]:
                wrong = [
                    (block, found, count)
                    for block, (found, count) in enumerate(zip(counts[group.index], group.pool.ref_counts, strict=True))
                    if block >= scratch and found != count
                ]
                raise IntegrityError(
                    f"group {group.index}: (block, references found, references counted) differ: {wrong[:10]}"
                )

    # -- inside ------------------------------------------------------------------------------------------

    def _index(self) -> None:
        """Name the full blocks that were confirmed since the last call, and enter them into the index.

        Names are of use to whoever looks for a prefix, and to blocks that outlive their sequence. Until one of the
        two comes up they are put off: then many blocks are named at once, and while nothing but decoding goes on,
        none are.
        """
        if not self._unnamed:
            return
        waiting, self._unnamed = self._unnamed, {}
        for sequence in waiting:
            self._root_chains(sequence)
        for at, hasher in enumerate(self._hashers):
            size = hasher.block_size
            hasher.extend_all((each.hash_chains[at], each, count // size) for each, count in waiting.items())
        for sequence, count in waiting.items():
            for group in self.groups:
                first, full = sequence.num_tagged[group.index], count // group.block_size
                if full > first:
                    table, chain = sequence.block_ids[group.index], sequence.hash_chains[group.chain]
                    for block in range(first, full):
                        group.pool.tag(table[block], chain[block + 1])
                    sequence.num_tagged[group.index] = full

    def _root_chains(self, sequence: KVSequence) -> list[list[bytes]]:
        if not sequence.hash_chains:
            sequence.hash_chains = [[hasher.root(sequence.adapter, sequence.cache_salt)] for hasher in self._hashers]
        return sequence.hash_chains

    def _chains(self, sequence: KVSequence, num_tokens: int) -> list[list[bytes]]:
        """The sequence's hash chains, extended over the full blocks of its first ``num_tokens`` tokens."""
        chains = self._root_chains(sequence)
        for chain, hasher in zip(chains, self._hashers):
            hasher.extend(chain, sequence, num_tokens // hasher.block_size)
        return chains

    def _schedule_confirm(self, sequence: KVSequence, num_tokens: int) -> None:
        """Set ``confirm_at`` so that `confirm` is next called when a block fills or falls behind a window."""
        nearest = NEVER
        if self.enable_prefix_caching and sequence.generation == self._generation:
            nearest = min((num_tokens // size + 1) * size for size in {h.block_size for h in self._hashers})
        if self.has_windows:
            for group in self.groups:
                if group.window is not None:
                    dropped = sequence.num_dropped[group.index]
                    nearest = min(nearest, (dropped + 1) * group.block_size + group.window - 1)
        sequence.confirm_at = nearest - 1
