"""schedule() ahead of commit(): pending tokens, ends and preemptions of requests in flight."""

from __future__ import annotations

from dougong.scheduling import RequestStatus
from dougong.types import FinishReason


def test_a_decode_row_uses_the_token_still_on_the_device(toy, rows) -> None:
    t = toy()
    a = t.add("a", 5, max_tokens=4)
    first, second = t.plan(), t.plan()
    assert rows(second) == [("a", 5, 1, True)]
    assert (a.num_tokens, a.num_computed) == (5, 6)
    t.commit(first)
    third = t.plan()
    assert rows(third) == [("a", 6, 1, True)]
    assert t.scheduler.num_in_flight == 2


def test_the_last_token_allowed_is_not_followed_by_a_useless_row(toy) -> None:
    t = toy()
    a = t.add("a", 5, max_tokens=2)
    first, second = t.plan(), t.plan()
    assert t.scheduler.schedule() is None
    assert t.scheduler.has_work
    t.commit(first)
    assert t.scheduler.schedule() is None
    assert t.commit(second) == [(a, 7, FinishReason.LENGTH)]
    assert not t.scheduler.has_work


def test_what_is_in_flight_for_an_ended_request_is_dropped(toy) -> None:
    t = toy()
    a = t.add("a", 5, max_tokens=9, eos_token_ids=[7])
    b = t.add("b", 5, max_tokens=9)
    first, second = t.plan(), t.plan()
    assert t.commit(first) == [(a, 7, FinishReason.STOP), (b, 7, None)]
    assert t.kv.num_free_blocks == 62
    assert t.commit(second) == [(b, 7, None)]
    assert a.output_token_ids == [7]
    t.drain()


def test_abort_while_in_flight(toy) -> None:
    t = toy()
    a, b = t.add("a", 5), t.add("b", 5)
    first, second = t.plan(), t.plan()
    t.scheduler.abort("a")
    assert [event[0] for event in t.commit(first)] == [b]
    assert [event[0] for event in t.commit(second)] == [b]
    assert a.output_token_ids == []


def plan_until_preempted(t, request):
    """The plan in flight while ``request`` is preempted, and the plan that preempts it."""
    in_flight = t.plan()
    for _ in range(50):
        following = t.plan()
        if request.num_preemptions:
            return in_flight, following
        t.commit(in_flight, len(request.output_token_ids))
        in_flight = following
    raise AssertionError("never preempted")


def test_the_token_in_flight_of_a_preempted_request_is_kept(toy) -> None:
    t = toy(blocks=7, size=4, caching=False)
    a, b = t.add("a", 8, max_tokens=12), t.add("b", 6, max_tokens=12)
    in_flight, following = plan_until_preempted(t, b)
    before = list(b.output_token_ids)
    assert (b.status, b.block_ids) == (RequestStatus.PREEMPTED, [])
    assert b in in_flight.requests
    assert b not in following.requests
    later = t.plan()
    assert b not in later.requests, "its newest token is not known yet"
    t.commit(in_flight, 99)
    assert b.output_token_ids == [*before, 99]
    t.commit(following)
    t.commit(later)
    t.drain()
    assert [len(r.output_token_ids) for r in (a, b)] == [12, 12]


def test_a_preempted_request_may_end_with_its_token_in_flight(toy) -> None:
    t = toy(blocks=7, size=4, caching=False)
    t.add("a", 8, max_tokens=12)
    b = t.add("b", 6, max_tokens=12, stop_token_ids=(99,))
    in_flight, following = plan_until_preempted(t, b)
    events = t.commit(in_flight, 99)
    assert (b, 99, FinishReason.STOP) in events
    assert b not in t.scheduler.waiting()
    t.commit(following)
    t.drain()


def test_requires_commit_waits_for_every_token(toy, rows) -> None:
    t = toy()
    guided = t.add("g", 5, max_tokens=3, requires_commit=True)
    t.add("a", 5, max_tokens=4)
    first = t.plan()
    second = t.plan()
    assert [row[0] for row in rows(second)] == ["a"]
    t.commit(first)
    third = t.plan()
    assert [row[0] for row in rows(third)] == ["g", "a"]
    t.commit(second)
    t.commit(third)
    t.drain()
    assert len(guided.output_token_ids) == 3


def test_only_committed_tokens_enter_the_prefix_index(toy) -> None:
    t = toy()
    t.add("a", range(8), max_tokens=2)
    plan = t.plan()
    assert t.kv.stats().cached_blocks == 0
    t.commit(plan)
    assert t.kv.stats().cached_blocks == 2


def test_a_seat_can_be_taken_again_while_its_last_plan_is_in_flight(toy) -> None:
    t = toy(max_num_seqs=1)
    a = t.add("a", 5, max_tokens=9, eos_token_ids=[7])
    b = t.add("b", 5)
    first, second = t.plan(), t.plan()
    t.commit(first)
    third = t.plan()
    assert (third.released, third.admitted) == ([0], [b])
    assert t.commit(second) == []
    assert [event[0] for event in t.commit(third)] == [b]
    assert a.output_token_ids == [7]
