"""Prefix hits, prompt logprobs, and n > 1 siblings that share a prompt's blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dougong.kv import BlockCopy, GroupSpec, KVSequence
from dougong.types import FinishReason


def test_a_hit_starts_where_the_cached_blocks_end(toy, rows) -> None:
    t = toy()
    t.add("a", range(10), max_tokens=1)
    t.step()
    b = t.add("b", [*range(10), 50, 51], max_tokens=1)
    assert rows(t.step()) == [("b", 8, 4, True)]
    assert b.num_cached_tokens == 8
    stats = t.scheduler.stats()
    assert (stats.kv.prefix_queries, stats.kv.prefix_hits) == (22, 8)
    assert stats.prefix_hit_rate == pytest.approx(8 / 22)


def test_a_whole_cached_prompt_computes_its_last_token_on_a_copy(toy, rows) -> None:
    t = toy()
    t.add("a", range(8), max_tokens=9)
    t.step()
    b = t.add("b", range(8), max_tokens=1)
    plan = t.plan()
    assert rows(plan)[1] == ("b", 7, 1, True)
    assert plan.num_decode_rows == 1, "a prompt's last token is not a decode row"
    assert len(plan.copies) == 1
    assert plan.copies[0].dst == b.block_ids[0][1]


def test_prompt_logprobs_compute_the_whole_prompt(toy, rows) -> None:
    t = toy()
    t.add("a", range(10), max_tokens=1)
    t.step()
    t.add("b", range(10), max_tokens=1, prompt_logprobs=1)
    assert rows(t.step()) == [("b", 0, 10, True)]


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_compute_only_the_last_prompt_token(toy, rows, caching: bool) -> None:
    t = toy(caching=caching)
    a = t.add("a", range(10), max_tokens=9)
    kids = [a.sibling(f"a{i}") for i in range(2)]
    for kid in kids:
        t.scheduler.add(kid)
    assert rows(t.step()) == [("a", 0, 10, True)], "they wait for the prompt"
    plan = t.plan()
    assert rows(plan) == [("a", 10, 1, True), ("a0", 9, 1, True), ("a1", 9, 1, True)]
    shared, last = a.block_ids[0][:2], a.block_ids[0][2]
    assert [kid.block_ids[0][:2] for kid in kids] == [shared, shared]
    assert plan.copies == [BlockCopy(0, last, kid.block_ids[0][2]) for kid in kids]
    t.commit(plan)
    t.drain()
    assert [len(r.output_token_ids) for r in (a, *kids)] == [9, 9, 9]


def test_siblings_fork_while_the_prompt_is_still_in_flight(toy, rows) -> None:
    t = toy(caching=False)
    a = t.add("a", range(10), max_tokens=3)
    t.scheduler.add(a.sibling("b"))
    first = t.plan()
    second = t.plan()
    assert rows(second) == [("a", 10, 1, True), ("b", 9, 1, True)]
    t.commit(first)
    t.commit(second)


def test_a_sibling_forks_from_another_when_the_first_has_ended(toy, rows) -> None:
    t = toy(caching=False, max_num_seqs=2)
    a = t.add("a", range(10), max_tokens=2)
    for name in "bc":
        t.scheduler.add(a.sibling(name))
    t.step()
    assert rows(t.step()) == [("a", 10, 1, True), ("b", 9, 1, True)]
    assert a.finish_reason is FinishReason.LENGTH
    assert rows(t.step()) == [("b", 10, 1, True), ("c", 9, 1, True)]


def test_siblings_compute_for_themselves_when_the_first_is_gone(toy, rows) -> None:
    t = toy(caching=False)
    a = t.add("a", range(10))
    b = a.sibling("b")
    t.scheduler.add(b)
    t.scheduler.abort("a")
    assert rows(t.step()) == [("b", 0, 10, True)]


def test_others_pass_siblings_that_wait_for_their_prompt(toy, rows) -> None:
    t = toy(max_num_batched_tokens=8)
    a = t.add("a", range(13))
    t.scheduler.add(a.sibling("b"))
    assert rows(t.step()) == [("a", 0, 8, False)]
    t.add("c", 2)
    assert rows(t.step()) == [("a", 8, 5, True), ("c", 0, 2, True)]
    assert [row[:3] for row in rows(t.step())] == [("a", 13, 1), ("c", 2, 1), ("b", 12, 1)]


def test_a_sibling_whose_window_has_passed_is_computed_again(toy, rows) -> None:
    t = toy(
        groups=[GroupSpec(block_size=2, num_blocks=40), GroupSpec(block_size=2, num_blocks=40, window=2)],
        caching=False,
        max_num_seqs=2,
    )
    a = t.add("a", range(6), max_tokens=9)
    b = t.add("z", 3, max_tokens=6)
    t.scheduler.add(a.sibling("b"))
    while not b.is_finished:
        t.step()
    assert rows(t.step())[-1] == ("b", 0, 6, True)
    t.drain()


def test_a_sibling_leaves_prompt_logprobs_to_the_first(toy) -> None:
    t = toy()
    a = t.add("a", 3, prompt_logprobs=2)
    assert a.sibling("b").sampling.prompt_logprobs is None
    assert a.sibling("c", a.sampling).sampling.prompt_logprobs == 2


def test_the_hash_of_a_prompt_is_made_once(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[KVSequence, int, int]] = []
    real = KVSequence.packed

    def counted(sequence: KVSequence, start: int, stop: int) -> bytes:
        packed.append((sequence, start, stop))
        return real(sequence, start, stop)

    t = toy(blocks=9, size=4, max_num_batched_tokens=16)
    a = t.add("a", 10, max_tokens=14)
    b = t.add("b", 10, max_tokens=14)
    monkeypatch.setattr(KVSequence, "packed", counted)
    t.drain()
    assert b.num_preemptions + a.num_preemptions > 0
    for request in (a, b):
        ranges = sorted((start, stop) for sequence, start, stop in packed if sequence is request)
        assert ranges[0] == (0, 8)
        assert all(end <= start for (_, end), (start, _) in pairwise(ranges)), "no block is hashed twice"
