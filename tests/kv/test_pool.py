"""BlockPool: order of reuse, reference counts, tags, and that its own check finds planted faults."""

from __future__ import annotations

import pytest

from dougong.errors import ConfigError
from dougong.kv import BlockPool, IntegrityError


def take(pool: BlockPool, count: int) -> list[int]:
    ids = pool.allocate(count)
    assert ids is not None
    return ids


def test_scratch_blocks_are_never_handed_out() -> None:
    pool = BlockPool(8, num_scratch_blocks=3)
    assert sorted(take(pool, 5)) == [3, 4, 5, 6, 7]
    assert pool.allocate(1) is None
    pool.check_integrity()


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(5)
    take(pool, 3)
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == []
    pool.check_integrity()


def test_a_block_is_freed_by_its_last_reference() -> None:
    pool = BlockPool(4)
    (block,) = take(pool, 1)
    pool.hold(block)
    pool.release([block])
    assert (pool.num_free, pool.ref_counts[block]) == (2, 1)
    pool.release([block])
    assert (pool.num_free, pool.ref_counts[block]) == (3, 0)
    pool.check_integrity()


def test_double_free_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(4)
    (block,) = take(pool, 1)
    pool.release([block])
    with pytest.raises(IntegrityError, match=f"block {block} was given back more often"):
        pool.release([block])
    pool.check_integrity()


def test_zero_in_a_table_is_skipped_but_other_scratch_blocks_are_an_error() -> None:
    pool = BlockPool(6, num_scratch_blocks=2)
    pool.release([0, 0])
    pool.check_integrity()
    with pytest.raises(IntegrityError, match="block 1 "):
        pool.release([1])


def test_untagged_blocks_are_reused_before_cached_ones_and_those_least_recently_freed_first() -> None:
    pool = BlockPool(7)
    first, second, third, plain = take(pool, 4)
    for block, tag in ((first, b"1"), (second, b"2"), (third, b"3")):
        assert pool.tag(block, tag)
    pool.release([second])
    pool.release([plain])
    pool.release([first])
    pool.release([third])
    untouched = [5, 6]
    assert pool.free_order() == [plain, *untouched, second, first, third]
    assert take(pool, 4) == [plain, *untouched, second]
    assert pool.num_evictions == 1
    assert pool.find(b"2") is None
    assert pool.find(b"1") == first
    pool.check_integrity()


def test_a_cached_block_can_be_revived_from_the_middle_of_the_free_list() -> None:
    pool = BlockPool(5)
    ids = take(pool, 4)
    for block in ids:
        pool.tag(block, bytes([block]))
    pool.release(ids)
    pool.hold(ids[1])
    pool.check_integrity()
    assert pool.free_order() == [ids[0], ids[2], ids[3]]
    assert take(pool, 3) == [ids[0], ids[2], ids[3]]
    assert pool.find(bytes([ids[1]])) == ids[1], "a held block keeps its tag"


def test_a_free_block_without_content_cannot_be_held() -> None:
    pool = BlockPool(3)
    with pytest.raises(IntegrityError, match="holds nothing"):
        pool.hold(1)


def test_the_first_block_with_a_tag_keeps_it() -> None:
    pool = BlockPool(4)
    a, b = take(pool, 2)
    assert pool.tag(a, b"x")
    assert not pool.tag(b, b"x")
    assert not pool.tag(a, b"y")
    assert pool.find(b"x") == a
    assert pool.find(b"y") is None
    with pytest.raises(IntegrityError, match="only a held block"):
        pool.tag(3, b"z")
    pool.check_integrity()


def test_clearing_tags_forgets_contents_and_keeps_references() -> None:
    pool = BlockPool(4)
    a, b = take(pool, 2)
    pool.tag(a, b"a")
    pool.tag(b, b"b")
    pool.release([b])
    pool.clear_tags()
    assert pool.num_cached == 0
    assert pool.ref_counts[a] == 1
    with pytest.raises(IntegrityError):
        pool.hold(b)
    pool.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "scratch", "message"),
    [(4, 0, "num_scratch_blocks=0: at least 1"), (3, 3, r"leaves no block to use: give num_blocks >= 4")],
)
def test_impossible_sizes_are_refused(blocks: int, scratch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockPool(blocks, scratch)


def corrupt_count(pool: BlockPool) -> None:
    pool.num_free += 1


def corrupt_reference(pool: BlockPool) -> None:
    pool.ref_counts[pool.free_order()[0]] = 1


def corrupt_scratch(pool: BlockPool) -> None:
    pool.ref_counts[0] = 2


def corrupt_link(pool: BlockPool) -> None:
    pool._prev[pool.free_order()[1]] = pool.free_order()[2]


def corrupt_cycle(pool: BlockPool) -> None:
    order = pool.free_order()
    pool._next[order[-1]] = order[0]


def corrupt_index(pool: BlockPool) -> None:
    pool._by_tag[b"stray"] = 2


@pytest.mark.parametrize(
    "fault",
    [corrupt_count, corrupt_reference, corrupt_scratch, corrupt_link, corrupt_cycle, corrupt_index],
    ids=lambda f: f.__name__,
)
def test_the_check_finds_faults(fault) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(8)
    take(pool, 2)
    pool.check_integrity()
    fault(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity()
