"""Refusals: what can never run is refused at once, and says what was asked, what fits and what to change."""

from __future__ import annotations

import pytest

from dougong.errors import ConfigError, InvalidRequestError
from dougong.kv import GroupSpec
from dougong.scheduling import Request, SchedulerConfig
from dougong.types import SamplingParams


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "request 'a': the prompt is empty; give at least one token"),
        ([1, -2], {}, "request 'a': token id -2 is negative"),
        ([1, 1 << 40], {}, r"request 'a': token id 1099511627776: token ids are integers from 0 to 2\^31 - 1"),
        ([1, "x"], {}, "request 'a': token id 'x'"),
        (
            range(64),
            {},
            "the prompt has 64 tokens; max_model_len=64 allows 63 and one output token. Shorten .* raise max_model_len",
        ),
        (
            range(30),
            {"max_tokens": None},
            "'a': 30 prompt tokens need the KV of 30 tokens; the whole pool holds 28. Shorten .* to at least 9",
        ),
        (
            range(20),
            {"max_tokens": 10},
            "request 'a': 20 prompt tokens and max_tokens=10 need the KV of 29 tokens; the whole pool holds 28",
        ),
        (range(9), {"multimodal": [(5, 5, b"x")]}, "at position 5 with 5 tokens is not inside the prompt of 9"),
    ],
)
def test_what_can_never_run_is_refused(toy, prompt, options, message: str) -> None:
    t = toy(blocks=8, size=4)
    with pytest.raises(InvalidRequestError, match=message):
        t.add("a", list(prompt), **options)
    assert not t.scheduler.has_unfinished
    good = t.add("a", 20, max_tokens=9)
    t.drain()
    assert len(good.output_token_ids) == 9


def test_exactly_fitting_requests_run_to_their_end(toy) -> None:
    t = toy(blocks=8, size=4)
    one = t.add("a", 28, max_tokens=1)
    other = t.add("b", 1, max_tokens=28)
    t.drain()
    assert [len(one.output_token_ids), len(other.output_token_ids)] == [1, 28]


def test_a_window_needs_room_for_itself_only_unless_the_prompt_comes_in_one_piece(toy) -> None:
    groups = [GroupSpec(block_size=4, num_blocks=4, window=5)]
    t = toy(groups=groups)
    a = t.add("a", 40, max_tokens=8)
    t.drain()
    assert len(a.output_token_ids) == 8
    t = toy(groups=groups, enable_chunked_prefill=False)
    with pytest.raises(InvalidRequestError, match="the whole pool holds 12"):
        t.add("a", 40, max_tokens=8)


def test_ids_must_be_free_and_requests_new(toy) -> None:
    t = toy()
    a = t.add("a", 3)
    with pytest.raises(InvalidRequestError, match="request 'a': a request with this id is not finished yet"):
        t.add("a", 3)
    t.drain()
    with pytest.raises(InvalidRequestError, match="was added before"):
        t.scheduler.add(a)
    t.add("a", 3)
    t.drain()


def test_siblings_must_be_alike(toy) -> None:
    t = toy()
    a = t.add("a", [1, 2, 3])
    for other in (
        Request("b", [1, 2, 4], parent=a),
        Request("b", [1, 2, 3], parent=a, adapter="x"),
        Request("b", [1, 2, 3], parent=a, cache_salt="x"),
        Request("b", [1, 2, 3], parent=a, multimodal=[(0, 1, b"x")]),
    ):
        with pytest.raises(InvalidRequestError, match="request 'b': its parent 'a' has another prompt"):
            t.scheduler.add(other)
    b = a.sibling("b")
    t.scheduler.add(b)
    with pytest.raises(InvalidRequestError, match="its parent 'b' is a sibling itself"):
        t.scheduler.add(Request("c", [1, 2, 3], parent=b))
    assert b.sibling("d").parent is a


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0: allowed is an integer >= 1"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens=1.5"),
        ({"max_model_len": 1}, "no room for a prompt token and an output token"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "Raise max_num_batched_tokens or lower max_num_seqs"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "or allow chunks"),
        ({"enable_chunked_prefill": False, "long_prefill_threshold": 4}, "drop one of them"),
        ({"long_prefill_threshold": 0}, "long_prefill_threshold=0"),
        ({"policy": "random"}, "policy='random': known are fcfs, priority"),
        ({"priority_aging_steps": 0}, "priority_aging_steps=0"),
        ({"watermark": 1.0}, "watermark=1.0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message: str) -> None:
    base = {"max_num_seqs": 4, "max_num_batched_tokens": 8192, "max_model_len": 4096}
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{**base, **options})


def test_a_head_of_line_that_lacks_blocks_is_not_overtaken(toy, rows) -> None:
    t = toy(blocks=9, size=4)
    t.add("a", 16, max_tokens=8)
    t.step()
    t.add("b", 24, max_tokens=2)
    t.add("c", 2, max_tokens=2)
    for _ in range(7):
        assert [row[0] for row in rows(t.step())] == ["a"]
    assert [row[0] for row in rows(t.step())] == ["b", "c"]


def test_prompts_under_way_keep_the_blocks_that_they_will_need(toy, rows) -> None:
    """Both prompts fit alone, not together: the second waits instead of overfilling the pool chunk by chunk."""
    t = toy(blocks=11, size=4, max_num_batched_tokens=8)
    t.add("a", 24, max_tokens=2)
    t.add("b", 24, max_tokens=2)
    names = [[row[0] for row in rows(t.step())] for _ in range(4)]
    assert names == [["a"]] * 4
    t.drain()
    assert t.scheduler.stats().total_preemptions == 0


def test_a_full_hit_that_leaves_no_block_for_the_copy_gives_up_its_last_block(toy) -> None:
    t = toy(blocks=5, size=4)
    prompt = list(range(16))
    first = t.add("a", prompt, max_tokens=1)
    t.drain()
    second = t.add("b", prompt, max_tokens=1)
    t.drain()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)


def test_alone_a_prompt_takes_smaller_chunks_when_a_window_pool_is_small(toy, rows) -> None:
    t = toy(groups=[GroupSpec(block_size=4, num_blocks=4, window=5)])
    t.add("a", 30, max_tokens=1)
    counts = []
    while t.scheduler.has_work:
        counts += [row[2] for row in rows(t.step())]
    assert sum(counts) == 30
    assert max(counts) <= 12


def test_defaults_of_a_request() -> None:
    request = Request("a", [1], SamplingParams(stop_token_ids=(4,)), eos_token_ids=[2])
    assert request.stop_ids == {None, 2, 4}
    assert "waiting" in repr(request)
