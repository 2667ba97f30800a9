"""Who goes first, who is preempted, and that nobody waits for ever."""

from __future__ import annotations

from dougong.scheduling import Request, RequestStatus, Scheduler, SchedulerConfig


def names(requests) -> list[str]:
    return [r.request_id for r in requests]


def test_first_come_first_served_ignores_priority(toy) -> None:
    t = toy(max_num_seqs=1)
    t.add("a", 2)
    t.add("b", 2, priority=-5)
    assert names(t.scheduler.waiting()) == ["a", "b"]


def test_priority_orders_and_equals_stay_in_order(toy) -> None:
    t = toy(policy="priority")
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1)):
        t.add(name, 2, priority=priority)
    assert names(t.scheduler.waiting()) == ["d", "b", "a", "c"]


def test_a_low_priority_is_overtaken_only_for_so_long(toy) -> None:
    """One seat, and a request of a better priority every step: without aging the first would never run."""

    def steps_until_served(aging: int | None) -> int | None:
        t = toy(policy="priority", priority_aging_steps=aging, max_num_seqs=1)
        t.add("busy", 2, max_tokens=1)
        patient = t.add("patient", 2, max_tokens=1, priority=1)
        for step in range(60):
            t.add(f"rival{step}", 2, max_tokens=1, priority=0)
            t.step()
            if patient.is_finished:
                return step
        return None

    assert steps_until_served(None) is None
    waited = steps_until_served(10)
    assert waited is not None
    assert 8 <= waited <= 12


def test_the_last_arrived_is_preempted_and_comes_back_first(toy, rows) -> None:
    t = toy(blocks=7, size=4)
    a, b = t.add("a", 8, max_tokens=12), t.add("b", 8, max_tokens=12)
    t.add("c", 8, max_tokens=2)
    t.step()
    while not b.num_preemptions:
        t.step()
    assert (a.num_preemptions, b.status, b.block_ids, b.batch_index) == (0, RequestStatus.PREEMPTED, [], -1)
    assert names(t.scheduler.waiting()) == ["b", "c"]
    assert t.scheduler.stats().num_preempted_waiting == 2, "c lost its blocks before b did"
    tokens = list(b.output_token_ids)
    assert tokens, "what it has produced is kept"
    while b.status is RequestStatus.PREEMPTED:
        plan = t.step()
    assert "b" in [row[0] for row in rows(plan)]
    t.drain()
    assert len(b.output_token_ids) == 12
    assert b.output_token_ids[: len(tokens)] == tokens


def test_the_lowest_priority_is_preempted_first(toy) -> None:
    t = toy(blocks=7, size=4, policy="priority")
    low, high = t.add("l", 8, max_tokens=12, priority=3), t.add("h", 8, max_tokens=12, priority=0)
    t.drain()
    assert low.num_preemptions >= 1
    assert high.num_preemptions == 0


def test_a_better_ranked_prompt_takes_blocks_from_a_worse_decode_already_in_the_step(toy, rows) -> None:
    t = toy(blocks=8, size=4, policy="priority", max_num_batched_tokens=8, watermark=0.0)
    low = t.add("l", 4, max_tokens=20, priority=3)
    t.step()
    high = t.add("h", 16, max_tokens=4, priority=0)
    seen = []
    while not high.is_finished:
        plan = t.plan()
        assert len(plan.requests) == len(set(plan.requests))
        seen.append([row[0] for row in rows(plan)])
        t.commit(plan)
    assert high.num_preemptions == 0
    t.drain()
    assert len(low.output_token_ids) == 20


def test_the_worst_ranked_stalls_rather_than_lose_what_it_has(toy, rows) -> None:
    t = toy(blocks=6, size=4)
    t.add("a", 6, max_tokens=6)
    b = t.add("b", 8, max_tokens=5)
    t.step()
    assert t.kv.num_free_blocks == 1
    assert [row[0] for row in rows(t.step())] == ["a", "b"]
    for _ in range(2):
        t.step()
    t.drain()
    assert b.num_preemptions <= 1


def test_a_policy_can_be_brought_along(toy) -> None:
    t = toy()
    shortest = Scheduler(
        SchedulerConfig(max_num_seqs=1), t.kv, policy=lambda r, order, step, config: (len(r.prompt_token_ids), order)
    )
    for name, length in (("long", 9), ("short", 2), ("middle", 5)):
        shortest.add(Request(name, range(length)))
    assert names(shortest.waiting()) == ["short", "middle", "long"]


def test_every_request_of_a_burst_ends_with_a_pool_for_two(toy) -> None:
    t = toy(blocks=9, size=4, max_num_seqs=8, max_num_batched_tokens=16)
    requests = [t.add(f"r{i}", [i] * (1 + i % 9), max_tokens=1 + i % 13) for i in range(40)]
    t.drain(3000)
    assert all(len(r.output_token_ids) == r.sampling.max_tokens for r in requests)
