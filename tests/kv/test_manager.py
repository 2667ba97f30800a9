"""KVCacheManager: hits, copy-on-write, windows, sharing, waste, reset."""

from __future__ import annotations

import pytest

from dougong.errors import ConfigError
from dougong.kv import BlockCopy, GroupSpec, IntegrityError, KVCacheManager, KVSequence
from dougong.kv.prefix import NO_HIT


def manager(blocks: int = 12, size: int = 4, *, caching: bool = True, window: int | None = None) -> KVCacheManager:
    groups = [GroupSpec(block_size=size, num_blocks=blocks)]
    if window is not None:
        groups.append(GroupSpec(block_size=size, num_blocks=blocks, window=window))
    return KVCacheManager(groups, enable_prefix_caching=caching)


def run(kv: KVCacheManager, sequence: KVSequence, tokens: int | None = None) -> int:
    """Compute the whole sequence; returns how much of it was found cached."""
    hit = kv.match(sequence)
    total = sequence.num_tokens if tokens is None else tokens
    assert kv.begin(sequence, hit, total) is not None
    kv.flush_copies()
    kv.confirm(sequence, total)
    return hit.num_tokens


def cached(kv: KVCacheManager, sequence: KVSequence) -> int:
    found = run(kv, sequence)
    kv.release(sequence)
    return found


def test_a_second_sequence_shares_full_blocks_only() -> None:
    kv = manager()
    a, b = KVSequence(range(10)), KVSequence([*range(10), 99])
    assert run(kv, a) == 0
    assert run(kv, b) == 8
    assert a.block_ids[0][:2] == b.block_ids[0][:2]
    assert a.block_ids[0][2] != b.block_ids[0][2]
    kv.check_integrity([a, b])


def test_at_least_one_token_is_left_and_the_last_block_is_copied() -> None:
    kv = manager()
    a, b = KVSequence(range(8)), KVSequence(range(8))
    run(kv, a)
    hit = kv.match(b)
    assert hit.num_tokens == 7
    copies = kv.begin(b, hit, 8)
    assert copies == [BlockCopy(0, a.block_ids[0][1], b.block_ids[0][1])]
    assert a.block_ids[0][0] == b.block_ids[0][0]
    assert a.block_ids[0][1] != b.block_ids[0][1]
    kv.check_integrity([a, b])
    kv.flush_copies()
    kv.check_integrity([a, b])


def test_the_source_of_a_copy_stays_until_the_step_is_planned() -> None:
    kv = manager(blocks=5)
    a = KVSequence(range(8))
    run(kv, a)
    source = a.block_ids[0][1]
    kv.release(a)
    b, other = KVSequence(range(8)), KVSequence([50])
    kv.begin(b, kv.match(b), 8)
    kv.begin(other, NO_HIT, 4)
    assert kv.num_free_blocks == 0
    assert source not in b.block_ids[0] + other.block_ids[0]
    kv.flush_copies()
    assert kv.num_free_blocks == 1
    kv.check_integrity([b, other])


def test_with_one_token_blocks_nothing_is_copied() -> None:
    kv = manager(size=1)
    a, b = KVSequence(range(5)), KVSequence(range(5))
    run(kv, a)
    hit = kv.match(b)
    assert (hit.num_tokens, kv.begin(b, hit, 5)) == (4, [])


def test_a_hit_can_give_up_its_partly_used_block() -> None:
    kv = manager()
    a = KVSequence(range(8))
    run(kv, a)
    short = kv.shorten(kv.match(KVSequence(range(8))))
    assert (short.num_tokens, short.blocks) == (4, (a.block_ids[0][:1],))
    assert kv.shorten(kv.match(KVSequence(range(4)))).num_tokens == 0


def test_only_confirmed_tokens_can_be_found() -> None:
    kv = manager()
    a = KVSequence(range(12))
    kv.begin(a, NO_HIT, 12)
    assert kv.match(KVSequence(range(12))).num_tokens == 0
    kv.confirm(a, 7)
    assert kv.match(KVSequence(range(12))).num_tokens == 4
    kv.confirm(a, 12)
    assert kv.match(KVSequence([*range(12), 5])).num_tokens == 12


def test_output_is_found_by_a_prompt_that_continues_it() -> None:
    kv = manager()
    a = KVSequence(range(3))
    kv.begin(a, NO_HIT, 3)
    for token in range(3, 9):
        a.output_token_ids.append(token)
        assert kv.grow(a, a.num_tokens) is not None
        kv.confirm(a, a.num_tokens)
    kv.release(a)
    assert cached(kv, KVSequence(range(20))) == 8


def test_nothing_is_found_across_salts_adapters_or_images() -> None:
    kv = manager(blocks=60)
    cached(kv, KVSequence(range(9)))
    assert cached(kv, KVSequence(range(9), cache_salt="tenant")) == 0
    assert cached(kv, KVSequence(range(9), adapter="lora")) == 0
    assert cached(kv, KVSequence(range(9), multimodal=[(4, 2, b"cat")])) == 4
    assert cached(kv, KVSequence(range(9), cache_salt="tenant")) == 8
    assert cached(kv, KVSequence(range(9))) == 8


def test_the_key_is_random_by_default() -> None:
    roots = {KVCacheManager([GroupSpec(block_size=4, num_blocks=4)])._hashers[0].root() for _ in range(3)}
    assert len(roots) == 3
    fixed = {
        KVCacheManager([GroupSpec(block_size=4, num_blocks=4)], hash_key=b"k", model_id=name)._hashers[0].root()
        for name in ("a", "a", "b")
    }
    assert len(fixed) == 2


def test_without_caching_nothing_is_found_or_hashed() -> None:
    kv = manager(caching=False)
    a = KVSequence(range(9))
    run(kv, a)
    assert a.hash_chains == []
    assert kv.match(KVSequence(range(9))).num_tokens == 0
    assert kv.stats().cached_blocks == 0


def test_hashes_survive_a_release() -> None:
    kv = manager()
    a = KVSequence(range(9))
    run(kv, a)
    chain = a.hash_chains[0]
    before = list(chain)
    kv.release(a)
    assert kv.match(a).num_tokens == 8
    assert a.hash_chains[0] is chain
    assert chain == before


def test_the_least_recently_used_prefix_is_evicted_tail_first() -> None:
    kv = manager(blocks=7)
    old, new = KVSequence([1] * 9), KVSequence([2] * 9)
    cached(kv, old)
    cached(kv, new)
    third = KVSequence([3] * 12)
    run(kv, third)
    assert kv.stats().evictions == 1
    assert kv.match(KVSequence([1] * 9)).num_tokens == 4, "the tail of the older one went first"
    assert kv.match(KVSequence([2] * 9)).num_tokens == 8


def test_grow_takes_blocks_only_when_one_is_full() -> None:
    kv = manager()
    a = KVSequence(range(5))
    kv.begin(a, NO_HIT, 5)
    grown = {tokens: kv.grow(a, tokens) for tokens in (6, 8, 9)}
    assert grown[6] == []
    assert grown[8] == []
    assert grown[9] == [(0, 2, [a.block_ids[0][2]])]
    assert a.capacity == 12


def test_grow_and_begin_change_nothing_when_a_group_is_full() -> None:
    kv = KVCacheManager([GroupSpec(block_size=4, num_blocks=10), GroupSpec(block_size=4, num_blocks=3)])
    a = KVSequence(range(8))
    kv.begin(a, NO_HIT, 8)
    assert kv.grow(a, 9) is None
    assert kv.begin(KVSequence([1]), NO_HIT, 1) is None
    assert kv.reach(a) == 8
    kv.check_integrity([a])
    assert [g.pool.num_free for g in kv.groups] == [7, 0]


def test_a_reserve_is_left_free() -> None:
    kv = manager(blocks=5)
    assert kv.begin(KVSequence(range(8)), NO_HIT, 8, [3]) is None
    assert kv.begin(KVSequence(range(8)), NO_HIT, 8, [2]) == []


def test_blocks_behind_the_window_are_freed_and_their_entries_zeroed() -> None:
    kv = manager(window=6)
    a = KVSequence(range(20))
    kv.begin(a, NO_HIT, 20)
    assert kv.confirm(a, 8) == []
    assert kv.confirm(a, 9) == [(1, 0, 1)], "position 9 sees 4 … 9"
    assert kv.confirm(a, 20) == [(1, 1, 2)], "position 20 sees 15 … 20"
    assert a.block_ids[1][:3] == [0, 0, 0]
    assert 0 not in a.block_ids[1][3:]
    assert 0 not in a.block_ids[0]
    kv.check_integrity([a])
    kv.release(a)
    kv.check_integrity([])
    assert [g.pool.num_free for g in kv.groups] == [11, 11]


def test_a_window_hit_needs_only_the_blocks_inside_the_window() -> None:
    kv = manager(blocks=12, window=6)
    a = KVSequence(range(17))
    run(kv, a)
    kv.release(a)
    window = kv.groups[1].pool
    evicted = [a.hash_chains[0][i + 1] for i in range(2)]
    for tag in evicted:  # as if the pool had needed those blocks
        window._tags[window._by_tag.pop(tag)] = None
    b = KVSequence([*range(16), 77])
    hit = kv.match(b)
    assert hit.num_tokens == 16
    assert hit.blocks[1][:2] == [0, 0]
    assert 0 not in hit.blocks[1][2:]
    assert 0 not in hit.blocks[0]
    assert kv.begin(b, hit, 17) == []
    kv.check_integrity([b])


def test_a_hit_is_the_longest_that_every_group_has() -> None:
    kv = manager(blocks=30, window=6)
    a = KVSequence(range(25))
    run(kv, a)
    kv.release(a)
    window = kv.groups[1].pool
    window._tags[window._by_tag.pop(a.hash_chains[0][5])] = None  # positions 16 … 19, the window of 20 and of 24
    assert kv.match(KVSequence(range(25))).num_tokens == 16
    full = kv.groups[0].pool
    full._tags[full._by_tag.pop(a.hash_chains[0][3])] = None  # positions 8 … 11
    assert kv.match(KVSequence(range(25))).num_tokens == 8


def test_groups_of_different_block_sizes_agree_on_a_common_boundary() -> None:
    kv = KVCacheManager([GroupSpec(block_size=2, num_blocks=40), GroupSpec(block_size=3, num_blocks=40)])
    run(kv, KVSequence(range(20)))
    assert kv.match(KVSequence(range(17))).num_tokens == 12
    b = KVSequence(range(18))
    hit = kv.match(b)
    assert hit.num_tokens == 17
    copies = kv.begin(b, hit, 18)
    assert copies is not None
    assert [copy.group for copy in copies] == [0, 1]


def test_share_copies_the_last_block_with_the_cache_off() -> None:
    kv = manager(caching=False)
    a, b = KVSequence(range(7)), KVSequence(range(7))
    kv.begin(a, NO_HIT, 8)
    hit = kv.share(a, 6)
    assert hit is not None
    copies = kv.begin(b, hit, 7)
    assert copies == [BlockCopy(0, a.block_ids[0][1], b.block_ids[0][1])]
    assert a.block_ids[0][0] == b.block_ids[0][0]
    kv.flush_copies()
    kv.check_integrity([a, b])
    kv.release(a)
    kv.check_integrity([b])


def test_share_is_refused_where_the_source_has_no_such_blocks() -> None:
    kv = manager(window=4)
    a = KVSequence(range(20))
    kv.begin(a, NO_HIT, 8)
    assert kv.share(a, 9) is None
    assert kv.grow(a, 20) is not None
    kv.confirm(a, 20)
    assert kv.share(a, 7) is None, "its window has passed"
    assert kv.share(a, 19) is not None


def test_after_a_reset_old_kv_is_never_found_again() -> None:
    kv = manager()
    a = KVSequence(range(12))
    kv.begin(a, NO_HIT, 12)
    kv.confirm(a, 4)
    kv.reset_prefix_cache()
    assert kv.match(KVSequence(range(12))).num_tokens == 0
    kv.confirm(a, 12)
    b = KVSequence(range(12))
    hit = kv.share(a, 11)
    assert hit is not None
    kv.begin(b, hit, 12)
    kv.flush_copies()
    kv.confirm(b, 12)
    assert kv.match(KVSequence(range(13))).num_tokens == 0, "neither a nor what was shared from it may enter"
    kv.release(a)
    kv.release(b)
    kv.check_integrity([])
    assert cached(kv, KVSequence(range(13))) == 0
    assert cached(kv, KVSequence(range(13))) == 12


def test_capacity_counts_what_one_sequence_can_hold() -> None:
    assert manager(blocks=5).capacity_tokens == 16
    windowed = KVCacheManager([GroupSpec(block_size=4, num_blocks=9), GroupSpec(block_size=4, num_blocks=4, window=5)])
    assert windowed.capacity_tokens == 32
    assert windowed.one_step_capacity_tokens == 12


def test_stats_and_description_say_what_is_there() -> None:
    kv = manager(blocks=11)
    a = KVSequence(range(9))
    run(kv, a)
    kv.count_prefix(9, 0)
    stats = kv.stats()
    assert (stats.usable_blocks, stats.free_blocks, stats.cached_blocks) == (10, 7, 2)
    assert stats.usage == pytest.approx(0.3)
    assert (stats.prefix_queries, stats.prefix_hits) == (9, 0)
    assert kv.describe()["capacity_tokens"] == 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVCacheManager([]), "got no groups"),
        (lambda: GroupSpec(block_size=0, num_blocks=4), "block_size=0: a block holds at least 1"),
        (lambda: GroupSpec(block_size=4, num_blocks=4, window=0), "window=0: a window sees at least 1"),
        (
            lambda: KVCacheManager([GroupSpec(block_size=4, num_blocks=4, window=14)]),
            "window=14 with block_size=4 needs 5 blocks for one sequence, the group has 3 usable: raise .* at least 6",
        ),
    ],
)
def test_impossible_groups_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_check_finds_a_leak() -> None:
    kv = manager()
    a = KVSequence(range(9))
    run(kv, a)
    kv.check_integrity([a])
    with pytest.raises(IntegrityError, match="references found, references counted"):
        kv.check_integrity([])


def test_kv_and_scheduling_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, dougong.kv, dougong.scheduling; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
