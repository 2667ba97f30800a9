"""What a step contains: budget, chunks, decodes first, ends, what a plan reports."""

from __future__ import annotations

import pytest

from dougong.errors import EngineError
from dougong.kv import GroupSpec
from dougong.scheduling import RequestStatus
from dougong.types import FinishReason


def test_a_request_prefills_decodes_and_ends_at_max_tokens(toy, rows) -> None:
    t = toy()
    a = t.add("a", 5, max_tokens=3)
    assert rows(t.step()) == [("a", 0, 5, True)]
    assert rows(t.step()) == [("a", 5, 1, True)]
    plan = t.plan()
    assert rows(plan) == [("a", 6, 1, True)]
    assert t.commit(plan) == [(a, 7, FinishReason.LENGTH)]
    assert (a.output_token_ids, a.status, a.num_computed) == ([7, 7, 7], RequestStatus.FINISHED, 7)
    assert t.scheduler.schedule() is None
    assert not t.scheduler.has_work


def test_decodes_come_first_and_chunks_fill_the_rest_of_the_budget(toy, rows) -> None:
    t = toy(max_num_batched_tokens=10)
    t.add("a", 3)
    t.step()
    t.add("b", 20)
    t.add("c", 4)
    plan = t.step()
    assert rows(plan) == [("a", 3, 1, True), ("b", 0, 9, False)]
    assert (plan.num_decode_rows, plan.total_tokens) == (1, 10)
    assert rows(t.step()) == [("a", 4, 1, True), ("b", 9, 9, False)]
    assert rows(t.step()) == [("a", 5, 1, True), ("b", 18, 2, True), ("c", 0, 4, True)]
    assert rows(t.step()) == [("b", 20, 1, True), ("c", 4, 1, True)]


def test_a_long_prompt_leaves_budget_to_others(toy, rows) -> None:
    t = toy(max_num_batched_tokens=16, long_prefill_threshold=6)
    t.add("a", 40)
    t.add("b", 5)
    t.add("c", 9)
    assert rows(t.step()) == [("a", 0, 6, False), ("b", 0, 5, True), ("c", 0, 5, False)]
    assert rows(t.step()) == [("b", 5, 1, True), ("a", 6, 6, False), ("c", 5, 4, True)]


def test_without_chunks_a_prompt_waits_until_it_fits_whole(toy, rows) -> None:
    t = toy(max_num_batched_tokens=16, max_model_len=16, enable_chunked_prefill=False)
    t.add("a", 8, max_tokens=2)
    t.add("b", 9)
    t.add("c", 2)
    assert rows(t.step()) == [("a", 0, 8, True)], "and nobody overtakes it"
    assert rows(t.step()) == [("a", 8, 1, True), ("b", 0, 9, True), ("c", 0, 2, True)]


def test_seats_are_limited_and_reused(toy, rows) -> None:
    t = toy(max_num_seqs=2)
    a = t.add("a", 2, max_tokens=1)
    b, c = t.add("b", 2), t.add("c", 2)
    plan = t.plan()
    assert [r.request_id for r in plan.admitted] == ["a", "b"]
    seat = a.batch_index
    assert {seat, b.batch_index} == {0, 1}
    assert (c.batch_index, t.scheduler.num_waiting) == (-1, 1)
    t.commit(plan)
    assert a.batch_index == -1
    plan = t.plan()
    assert plan.released == [seat]
    assert plan.admitted == [c]
    assert c.batch_index == seat


def test_a_plan_carries_only_changes_of_block_tables(toy) -> None:
    t = toy(size=4)
    a = t.add("a", 6, max_tokens=20)
    plan = t.step()
    assert plan.new_blocks == [(a.batch_index, 0, 0, a.block_ids[0])]
    for _ in range(2):
        assert t.step().new_blocks == []
    assert t.step().new_blocks == [(a.batch_index, 0, 2, [a.block_ids[0][2]])]
    assert len(a.block_ids[0]) == 3


def test_rows_changed_is_false_only_in_steady_decode(toy) -> None:
    t = toy()
    t.add("a", 6, max_tokens=20)
    t.add("b", 6, max_tokens=5)
    changed = [t.step().rows_changed for _ in range(4)]
    assert changed == [True, True, False, False]
    assert t.step().rows_changed is False
    assert t.step().rows_changed is True, "b has ended"
    assert t.step().rows_changed is False
    t.add("c", 2)
    assert [t.step().rows_changed for _ in range(3)] == [True, True, False]


def test_zeroed_window_entries_are_reported(toy) -> None:
    t = toy(groups=[GroupSpec(block_size=4, num_blocks=20), GroupSpec(block_size=4, num_blocks=20, window=4)])
    a = t.add("a", 11, max_tokens=20)
    t.step()
    assert (a.batch_index, 1, 0, [0, 0]) in t.step().new_blocks
    assert a.block_ids[1][:2] == [0, 0]


@pytest.mark.parametrize(
    ("options", "tokens", "reason", "stop"),
    [
        ({"eos_token_ids": [7]}, 1, FinishReason.STOP, None),
        ({"eos_token_ids": [7], "ignore_eos": True}, 4, FinishReason.LENGTH, None),
        ({"stop_token_ids": (7,)}, 1, FinishReason.STOP, 7),
        ({"stop_token_ids": (7,), "eos_token_ids": [7], "ignore_eos": True}, 1, FinishReason.STOP, 7),
        ({"eos_token_ids": [7], "min_tokens": 3}, 3, FinishReason.STOP, None),
        ({"eos_token_ids": [8]}, 4, FinishReason.LENGTH, None),
        ({"max_tokens": None}, 59, FinishReason.LENGTH, None),
        ({"max_tokens": 100}, 59, FinishReason.LENGTH, None),
    ],
)
def test_when_a_request_ends(toy, options, tokens, reason, stop) -> None:
    t = toy(max_model_len=64)
    a = t.add("a", 5, **options)
    t.drain()
    assert (len(a.output_token_ids), a.finish_reason, a.stop_reason) == (tokens, reason, stop)


def test_an_unlimited_request_ends_where_the_pool_does(toy) -> None:
    t = toy(blocks=4, size=4)
    a = t.add("a", 5, max_tokens=None)
    t.drain()
    assert a.num_tokens == 13
    assert a.finish_reason is FinishReason.LENGTH


def test_a_row_without_a_token_ends_its_request_alone(toy) -> None:
    t = toy()
    a, b = t.add("a", 3), t.add("b", 3)
    events = t.scheduler.commit(t.plan(), [None, 7])
    assert events == [(a, None, FinishReason.ERROR), (b, 7, None)]
    assert t.scheduler.commit(t.plan(), [None]) == [(b, None, FinishReason.ERROR)]
    t.drain()


def test_commit_refuses_a_plan_out_of_order_and_a_short_answer(toy) -> None:
    t = toy()
    t.add("a", 3)
    first = t.plan()
    second = t.plan()
    with pytest.raises(EngineError, match="commit of plan 1: the oldest in flight is 0"):
        t.scheduler.commit(second, [7])
    with pytest.raises(EngineError, match="commit of plan 0: 0 sampled tokens for 1 rows"):
        t.scheduler.commit(first, [])
    t.commit(first)
    t.commit(second)
    with pytest.raises(EngineError, match="the oldest in flight is none"):
        t.scheduler.commit(second, [7])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_abort_in_every_state(toy, steps: int) -> None:
    """Waiting, in the middle of its prompt, at its end, decoding; the other request is unharmed."""
    t = toy(max_num_batched_tokens=8)
    other = t.add("o", 2, max_tokens=9)
    a = t.add("a", 12, max_tokens=9)
    for _ in range(steps):
        t.step()
    assert t.scheduler.abort("a") is a
    assert (a.status, a.finish_reason, a.batch_index) == (RequestStatus.FINISHED, FinishReason.ABORT, -1)
    t.scheduler.check_integrity()
    assert t.scheduler.abort("a") is None
    assert t.scheduler.abort("unknown") is None
    t.drain()
    assert len(other.output_token_ids) == 9


def test_finish_keeps_the_reason_it_is_given(toy) -> None:
    t = toy()
    a = t.add("a", 3)
    t.step()
    assert t.scheduler.finish("a", FinishReason.STOP, "###") is a
    assert (a.finish_reason, a.stop_reason) == (FinishReason.STOP, "###")


def test_stats_and_description(toy) -> None:
    t = toy(blocks=11, max_num_seqs=2)
    for name in "abc":
        t.add(name, 6, max_tokens=2)
    t.step()
    stats = t.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_plans_in_flight) == (2, 1, 0)
    assert stats.kv_usage == pytest.approx(0.4)
    assert (stats.total_steps, stats.total_scheduled_tokens) == (1, 12)
    t.drain()
    assert t.scheduler.stats().total_finished["length"] == 3
    description = t.scheduler.describe()
    assert description["max_num_seqs"] == 2
    assert description["kv"]["capacity_tokens"] == 40
