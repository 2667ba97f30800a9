"""Greedy tokens are transformers', however requests are batched, cut, cached, preempted and overlapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from e2e_harness import TINY, Reference, check_clean, greedy, opened, prompts, tokens_of

COUNT = 20

WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "chunks-1": {"long_prefill_token_threshold": 1},
    "chunks-7": {"long_prefill_token_threshold": 7},
    "chunks-16": {"long_prefill_token_threshold": 16},
    "chunks-64": {"long_prefill_token_threshold": 64},
    "budget-11": {"max_num_batched_tokens": 11},
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
    "eager": {"enforce_eager": True},
}


def _cases() -> list[Any]:
    """Every way on both models, overlapped and in turn; a part of them is enough for every day."""
    quick = {("llama", "batched", False), ("llama", "chunks-7", True), ("gemma", "chunks-7", False)}
    quick |= {("gemma", way, True) for way in WAYS}
    return [
        pytest.param(name, way, overlap, id=f"{name}-{way}-{'overlap' if overlap else 'in-turn'}",
                     marks=() if (name, way, overlap) in quick else pytest.mark.prove)
        for name in TINY for way in WAYS for overlap in (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "way", "overlap"), _cases())
def test_tokens_are_those_of_transformers(
    tiny: dict[str, Path], references: dict[str, Reference], name: str, way: str, overlap: bool
) -> None:
    items = prompts()
    expected = [references[name].greedy(item, COUNT) for item in items]
    with opened(tiny[name], overlap=overlap, **WAYS[way]) as llm:
        assert tokens_of(llm, items, COUNT) == expected


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.prove)], ids=["overlap", "in-turn"])
@pytest.mark.parametrize("name", TINY)
def test_a_pool_too_small_for_all_preempts_and_changes_no_token(
    tiny: dict[str, Path], references: dict[str, Reference], name: str, overlap: bool
) -> None:
    count = 40
    items = [item for item in prompts(10) if len(item) < 60]
    expected = [references[name].greedy(item, count) for item in items]
    with opened(tiny[name], overlap=overlap, num_kv_blocks=13, max_model_len=128) as llm:
        assert tokens_of(llm, items, count) == expected
        assert llm.engine.stats.preemptions > 0


@pytest.mark.parametrize("name", TINY)
def test_a_second_run_finds_the_prefixes_and_gives_the_same_tokens(
    tiny: dict[str, Path], references: dict[str, Reference], name: str
) -> None:
    items = prompts()
    expected = [references[name].greedy(item, COUNT) for item in items]
    with opened(tiny[name]) as llm:
        assert tokens_of(llm, items, COUNT) == expected
        outputs = llm.generate([list(item) for item in items], greedy(COUNT), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert sum(output.num_cached_tokens for output in outputs) >= 32
        llm.engine.reset_prefix_cache()
        again = llm.generate([items[2]], greedy(COUNT), use_tqdm=False)[0]
        assert again.num_cached_tokens == 0 and again.outputs[0].token_ids == expected[2]


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in-turn"])
def test_requests_that_come_while_others_run(
    tiny: dict[str, Path], references: dict[str, Reference], overlap: bool
) -> None:
    items = prompts()
    expected = [references["gemma"].greedy(item, COUNT) for item in items]
    with opened(tiny["gemma"], overlap=overlap, max_num_seqs=4, long_prefill_token_threshold=16) as llm:
        engine = llm.engine
        outputs = []
        for index, item in enumerate(items):
            outputs.append(engine.add(f"r{index}", item, greedy(COUNT)))
            for _ in range(index % 4):
                engine.step()
                engine.scheduler.check_integrity()
        check_clean(engine)
        assert [output.outputs[0].token_ids for output in outputs] == expected
