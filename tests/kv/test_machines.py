"""State machines: the pool against a dictionary, the manager against what each block should contain."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dougong.kv import BlockPool, GroupSpec, KVCacheManager, KVSequence
from dougong.kv.prefix import NO_HIT, PrefixHit

SETTINGS = settings(max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


class PoolMachine(RuleBasedStateMachine):
    """Held blocks with their counts, and free ones in the order that reuse must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, num_scratch_blocks=2)
        self.held: Counter[int] = Counter()
        self.plain = list(range(2, 10))  # next to be reused first
        self.cached: list[int] = []
        self.tags: dict[int, bytes] = {}
        self.names = 0

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        ids = self.pool.allocate(count)
        if count > len(self.plain) + len(self.cached):
            assert ids is None
            return
        order = (self.plain + self.cached)[:count]
        assert ids == order
        for block in order:
            (self.plain if block in self.plain else self.cached).remove(block)
            self.tags.pop(block, None)
            self.held[block] = 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        references = sorted(self.held.elements())
        ids = data.draw(st.lists(st.sampled_from(range(len(references))), unique=True, max_size=5))
        blocks = [references[i] for i in ids]
        self.pool.release(blocks)
        for block in blocks:
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                if block in self.tags:
                    self.cached.append(block)
                else:
                    self.plain.insert(0, block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), new=st.booleans())
    def tag(self, data: st.DataObject, new: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.held)))
        name = b"%d" % (self.names if new else data.draw(st.integers(0, self.names)))
        self.names += new
        fresh = block not in self.tags and name not in self.tags.values()
        assert self.pool.tag(block, name) is fresh
        if fresh:
            self.tags[block] = name

    @precondition(lambda self: self.tags or self.held)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({*self.tags, *self.held})))
        self.pool.hold(block)
        if block in self.cached:
            self.cached.remove(block)
        self.held[block] += 1

    @rule()
    def clear(self) -> None:
        self.pool.clear_tags()
        self.tags.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_order() == self.plain + self.cached
        assert {b: c for b, c in enumerate(self.pool.ref_counts) if c and b > 1} == dict(self.held)
        assert self.pool.num_cached == len(self.tags)
        for block, name in self.tags.items():
            assert self.pool.find(name) == block


class ManagerMachine(RuleBasedStateMachine):
    """Blocks' contents as token histories. A hit must hold the sequence's own history, in every group."""

    def __init__(self) -> None:
        super().__init__()
        self.living: list[KVSequence] = []
        self.computed: dict[int, int] = {}
        self.contents: dict[tuple[int, int], tuple[object, ...]] = {}

    @initialize(
        sizes=st.sampled_from([(2,), (1,), (4,), (2, 4), (3, 2)]),
        windows=st.sampled_from([(None, None), (None, 3), (5, None), (4, 4)]),
        blocks=st.integers(8, 20),
        caching=st.sampled_from([True, True, True, False]),
    )
    def begin(self, sizes: tuple[int, ...], windows: tuple[int | None, ...], blocks: int, caching: bool) -> None:
        groups = [GroupSpec(block_size=s, num_blocks=blocks, window=w) for s, w in zip(sizes, windows)]
        self.kv = KVCacheManager(groups, enable_prefix_caching=caching)

    def history(self, sequence: KVSequence, position: int) -> tuple[object, ...]:
        return (sequence.cache_salt, *sequence.token_slice(0, position + 1))

    def compute(self, sequence: KVSequence, start: int, stop: int) -> None:
        others = [s for s in self.living if s is not sequence]
        for group in self.kv.groups:
            size = group.block_size
            table = sequence.block_ids[group.index]
            for position in range(start, stop):
                block = table[position // size]
                assert block
                assert all(block not in other.block_ids[group.index] for other in others), "a shared block is written"
                self.contents[group.index, block * size + position % size] = self.history(sequence, position)
        self.check_visible(sequence, start)
        self.computed[id(sequence)] = stop

    def check_visible(self, sequence: KVSequence, query: int) -> None:
        for group in self.kv.groups:
            size = group.block_size
            first = 0 if group.window is None else max(0, query - group.window + 1)
            for position in range(first, query):
                block = sequence.block_ids[group.index][position // size]
                assert block, "freed while visible"
                assert self.contents[group.index, block * size + position % size] == self.history(sequence, position)

    @rule(
        stem=st.integers(0, 1),
        length=st.integers(1, 14),
        tail=st.lists(st.integers(0, 1), max_size=2),
        salt=st.sampled_from([None, None, "s"]),
    )
    def start(self, stem: int, length: int, tail: list[int], salt: str | None) -> None:
        sequence = KVSequence(([stem, 1, 0, 1, 1] * 3)[:length] + tail, cache_salt=salt)
        self.admit(sequence, self.kv.match(sequence))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.living))
        length = data.draw(st.integers(0, self.computed[id(source)] - 1))
        sequence = KVSequence(source.token_slice(0, length + 1), cache_salt=source.cache_salt)
        hit = self.kv.share(source, length)
        if hit is not None:
            self.admit(sequence, hit)

    def admit(self, sequence: KVSequence, hit: PrefixHit) -> None:
        total = sequence.num_tokens
        assert hit.num_tokens < total
        free = [group.pool.num_free for group in self.kv.groups]
        copies = self.kv.begin(sequence, hit, total)
        if copies is None:
            assert [group.pool.num_free for group in self.kv.groups] == free
            assert not sequence.block_ids
            return
        self.living.append(sequence)
        self.kv.check_integrity(self.living)
        for group, src, dst in copies:
            size = self.kv.groups[group].block_size
            for place in range(size):
                content = self.contents.get((group, src * size + place))
                self.contents.pop((group, dst * size + place), None)
                if content is not None:
                    self.contents[group, dst * size + place] = content
        self.kv.flush_copies()
        self.compute(sequence, hit.num_tokens, total)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), token=st.integers(0, 1), count=st.integers(1, 6))
    def decode(self, data: st.DataObject, token: int, count: int) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        for _ in range(count):
            start = self.computed[id(sequence)]
            if self.kv.grow(sequence, start + 1) is None:
                assert self.kv.reach(sequence) == start
                return
            if sequence.num_tokens == start:
                sequence.output_token_ids.append(token)
            self.compute(sequence, start, start + 1)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), lag=st.integers(0, 3))
    def confirm(self, data: st.DataObject, lag: int) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        tables = [list(table) for table in sequence.block_ids]
        confirmed = max(0, self.computed[id(sequence)] - lag)
        before = list(sequence.num_dropped)
        freed = self.kv.confirm(sequence, confirmed)
        for group, first, count in freed:
            assert 0 not in tables[group][first : first + count]
            tables[group][first : first + count] = [0] * count
        assert tables == sequence.block_ids
        if sequence.num_dropped != before:
            self.check_visible(sequence, confirmed)
        self.check_visible(sequence, self.computed[id(sequence)])

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        self.living.remove(sequence)
        self.kv.release(sequence)

    @rule()
    def nothing_is_lost(self) -> None:
        self.kv.check_integrity(self.living)

    def teardown(self) -> None:
        for sequence in self.living:
            self.kv.release(sequence)
        if hasattr(self, "kv"):
            self.kv.check_integrity([])
            assert all(group.pool.num_free == group.pool.num_usable for group in self.kv.groups)


PoolMachine.TestCase.settings = SETTINGS
ManagerMachine.TestCase.settings = SETTINGS
TestPool = PoolMachine.TestCase
TestManager = ManagerMachine.TestCase


def test_no_hit_is_empty() -> None:
    assert (NO_HIT.num_tokens, NO_HIT.blocks) == (0, ())
