"""SmolLM2-135M, the packaged model: 50 prompts, every way to run them, the tokens of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_harness import Reference, check_clean, greedy, make_llm

from dougong import LLM

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900), pytest.mark.xdist_group("smollm2")]

COUNT = 24
TEXTS = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))

WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "batched-in-turn": {"overlap": False},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "no-prefix-cache-in-turn": {"enable_prefix_caching": False, "overlap": False},
    "chunks-1": {"long_prefill_token_threshold": 1},
    "chunks-7": {"long_prefill_token_threshold": 7},
    "chunks-16": {"long_prefill_token_threshold": 16, "overlap": False},
    "chunks-64": {"long_prefill_token_threshold": 64},
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
    "small-steps": {"max_num_batched_tokens": 50},
    "few-at-once": {"max_num_seqs": 5},
    "small-pool": {"num_kv_blocks": 40},
    "small-pool-in-turn": {"num_kv_blocks": 40, "overlap": False},
}


def llm_of(**options: Any) -> LLM:
    values: dict[str, Any] = {"max_num_seqs": 50, "max_model_len": 512, "num_kv_blocks": 600, **options}
    return make_llm("smollm2-135m", **values)


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    llm = llm_of()
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def items(plain: LLM) -> list[list[int]]:
    tokenizer = plain.get_tokenizer()
    return [list(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.fixture(scope="module")
def alone(plain: LLM, items: list[list[int]]) -> list[list[int]]:
    """Our tokens, one request after the other."""
    return [run(plain, [item])[0] for item in items]


@pytest.fixture(scope="module")
def expected(plain: LLM, items: list[list[int]], alone: list[list[int]]) -> list[list[int]]:
    """transformers' tokens."""
    reference = Reference(plain.model_path)
    assert reference.greedy(items[2], COUNT) == reference.greedy_near(items[2], alone[2])
    return [reference.greedy_near(item, guess) for item, guess in zip(items, alone)]


def run(llm: LLM, items: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate([list(item) for item in items], greedy(COUNT), use_tqdm=False)
    check_clean(llm.engine)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_there_are_50_prompts_and_they_vary(items: list[list[int]]) -> None:
    lengths = sorted(map(len, items))
    assert len(items) == 50 and lengths[0] <= 3 and lengths[-1] >= 100 and len(set(map(tuple, items))) == 50


def test_one_after_the_other(alone: list[list[int]], expected: list[list[int]]) -> None:
    assert alone == expected


@pytest.mark.parametrize("way", WAYS)
def test_together(way: str, items: list[list[int]], expected: list[list[int]]) -> None:
    llm = llm_of(**WAYS[way])
    try:
        assert run(llm, items) == expected
        assert ("small-pool" in way) == (llm.engine.stats.preemptions > 0)
        if way == "batched":  # and again, out of the prefix cache
            assert run(llm, items) == expected
            assert llm.engine.stats.cached_tokens > 500
    finally:
        llm.close()
