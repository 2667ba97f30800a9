"""The block pool: reference counts, an O(1) free list, and the tags (hashes) of blocks worth keeping."""

from __future__ import annotations

from collections.abc import Iterable

from dougong.errors import ConfigError

__all__ = ["BlockPool", "IntegrityError"]


class IntegrityError(AssertionError):
    """The pool's books contradict themselves: a bug in this package or in its caller, never user input."""


class BlockPool:
    """Block ids 0 … ``num_blocks - 1`` of one KV group. Not thread-safe: one scheduler owns it.

    Ids below ``num_scratch_blocks`` are the scratch blocks: never handed out, so that padding has somewhere
    to write and a table entry of 0 can mean "nothing here".

    A block is *held* (``ref_counts[id] > 0``) or *free* (0, and linked in the free list). The list is
    intrusive: the links are two parallel lists of ints indexed by block id, with one sentinel, so that taking
    any block out of the middle is O(1) and allocates nothing. A free block may carry a *tag*, the hash of
    the tokens whose KV it still holds. It can then be revived with `hold` until `allocate` overwrites it.
    Untagged blocks are reused first, then tagged ones, least recently freed first (LRU).
    """

    __slots__ = (
        "_by_tag",
        "_next",
        "_prev",
        "_sentinel",
        "_tags",
        "num_blocks",
        "num_evictions",
        "num_free",
        "num_scratch_blocks",
        "ref_counts",
    )

    def __init__(self, num_blocks: int, num_scratch_blocks: int = 1) -> None:
        if num_scratch_blocks < 1:
            raise ConfigError(
                f"num_scratch_blocks={num_scratch_blocks}: at least 1 is needed, because table entry 0 means "
                "'no block' and padding writes there."
            )
        if num_blocks <= num_scratch_blocks:
            raise ConfigError(
                f"num_blocks={num_blocks} with num_scratch_blocks={num_scratch_blocks} leaves no block to use: "
                f"give num_blocks >= {num_scratch_blocks + 1}."
            )
        self.num_blocks = num_blocks
        self.num_scratch_blocks = num_scratch_blocks
        self.num_free = num_blocks - num_scratch_blocks
        self.num_evictions = 0
        self.ref_counts: list[int] = [1] * num_scratch_blocks + [0] * self.num_free
        self._tags: list[bytes | None] = [None] * num_blocks
        self._by_tag: dict[bytes, int] = {}
        self._sentinel = num_blocks
        self._next = list(range(1, num_blocks + 2))
        self._prev = list(range(-1, num_blocks))
        self._next[num_blocks] = num_scratch_blocks
        self._prev[num_blocks] = num_blocks - 1
        self._prev[num_scratch_blocks] = num_blocks

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all but the scratch blocks."""
        return self.num_blocks - self.num_scratch_blocks

    @property
    def num_cached(self) -> int:
        """Blocks with a tag, held or free."""
        return len(self._by_tag)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with reference count 1, or None (and no change) if fewer are free.

        Their old contents are forgotten: a tagged block that is taken leaves the index.
        """
        if count > self.num_free:
            return None
        ids: list[int] = []
        nxt, refs, tags, by_tag = self._next, self.ref_counts, self._tags, self._by_tag
        block = nxt[self._sentinel]
        for _ in range(count):
            ids.append(block)
            refs[block] = 1
            tag = tags[block]
            if tag is not None:
                del by_tag[tag]
                tags[block] = None
                self.num_evictions += 1
            block = nxt[block]
        nxt[self._sentinel] = block
        self._prev[block] = self._sentinel
        self.num_free -= count
        return ids

    def hold(self, block: int) -> None:
        """One more reference to ``block``: it is held already, or it is free and its tag was just looked up."""
        refs = self.ref_counts
        if refs[block] == 0:
            if self._tags[block] is None:
                raise IntegrityError(f"block {block} is free and holds nothing: allocate it instead of holding it")
            before, after = self._prev[block], self._next[block]
            self._next[before] = after
            self._prev[after] = before
            self.num_free -= 1
        refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give one reference of each block back; the last one frees it. Zeros in ``blocks`` are skipped.

        Give a request's blocks back last block first: the free list reuses the earliest returned first, and
        the end of a prompt is worth less to others than its beginning.
        """
        refs, nxt, prev, tags, sentinel = self.ref_counts, self._next, self._prev, self._tags, self._sentinel
        scratch = self.num_scratch_blocks
        for block in blocks:
            if not block:
                continue
            left = refs[block] - 1
            if left < 0 or block < scratch:
                raise IntegrityError(f"block {block} was given back more often than it was handed out")
            refs[block] = left
            if left:
                continue
            if tags[block] is None:
                before, after = sentinel, nxt[sentinel]
            else:
                before, after = prev[sentinel], sentinel
            prev[block], nxt[block] = before, after
            nxt[before] = prev[after] = block
            self.num_free += 1

    def tag(self, block: int, tag: bytes) -> bool:
        """Say that held ``block`` holds the tokens that ``tag`` stands for; False if nothing changed.

        The first block with a tag keeps it: a second copy of the same content stays untagged, and is reused
        first when freed.
        """
        if self._tags[block] is not None or tag in self._by_tag:
            return False
        if not self.ref_counts[block]:
            raise IntegrityError(f"block {block} is free: only a held block's content can be tagged")
        self._tags[block] = tag
        self._by_tag[tag] = block
        return True

    def find(self, tag: bytes) -> int | None:
        """The block with this tag, held or free; None if there is none."""
        return self._by_tag.get(tag)

    def cached_blocks(self) -> set[int]:
        """Blocks with a tag. O(cached); for reports."""
        return set(self._by_tag.values())

    def clear_tags(self) -> None:
        """Forget all cached contents. Held blocks stay held."""
        self._by_tag.clear()
        self._tags = [None] * self.num_blocks

    def free_order(self) -> list[int]:
        """Free blocks in the order in which they would be reused. O(free); for tests and reports."""
        order: list[int] = []
        block = self._next[self._sentinel]
        while block != self._sentinel and len(order) <= self.num_blocks:
            order.append(block)
            block = self._next[block]
        return order

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless list, counts and tags agree. O(num_blocks); for tests and idle time."""
        order = self.free_order()
        if len(order) != self.num_free or len(set(order)) != len(order):
            raise IntegrityError(f"free list has {len(order)} entries, num_free says {self.num_free}: {order[:20]}")
        backwards: list[int] = []
        block = self._prev[self._sentinel]
        while block != self._sentinel and len(backwards) <= len(order):
            backwards.append(block)
            block = self._prev[block]
        if backwards[::-1] != order:
            raise IntegrityError("the free list's backward links differ from its forward links")
        if [i for i, count in enumerate(self.ref_counts) if count == 0] != sorted(order):
            raise IntegrityError("blocks with reference count 0 are not exactly those in the free list")
        if any(count < 0 for count in self.ref_counts):
            raise IntegrityError("negative reference count")
        if any(self.ref_counts[i] != 1 for i in range(self.num_scratch_blocks)):
            raise IntegrityError("a scratch block was handed out")
        tagged = {tag: block for block, tag in enumerate(self._tags) if tag is not None}
        if tagged != self._by_tag or len(tagged) != sum(tag is not None for tag in self._tags):
            raise IntegrityError("tags of blocks and the index of tags differ")
