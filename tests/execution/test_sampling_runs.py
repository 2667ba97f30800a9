"""Sampling options through the whole runner: tokens in flight count, and overlap changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from execution_harness import drive, full_logits, make_runner, prompts, request
from test_sampler import Row

from dougong.execution.delta import request_seed

KINDS: dict[str, dict[str, Any]] = {
    "random": {"temperature": 0.9, "seed": 7},
    "unseeded": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    "words": {"bad_words_ids": ((5,), (6, 7), (40, 41, 42))},
    "minimum": {"min_tokens": 9, "stop_token_ids": (3, 4, 5, 6, 7, 8, 9, 10), "temperature": 2.0},
    "bias": {"logit_bias": {33: 8.0, 5: -100.0}, "allowed_token_ids": (5, 33, 34, 35)},
    "logprobs": {"logprobs": 4, "temperature": 1.0},
    "greedy": {},
}


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 9, "num_kv_blocks": 20}], ids=["plain", "preempted"]
)
def test_every_option_with_and_without_overlap(llama_folder: Path, options: dict[str, Any]) -> None:
    given = prompts(len(KINDS), seed=11)

    def make() -> list[Any]:
        return [request(name, prompt, max_tokens=14, **kind) for (name, kind), prompt in zip(KINDS.items(), given)]

    runner = make_runner(llama_folder, sharpen=6.0, **options)
    plain = drive(runner, make())
    assert drive(make_runner(llama_folder, sharpen=6.0, **options), make(), overlap=True) == plain
    for one in make():
        tokens = plain[one.request_id]
        logits = full_logits(runner.model, one.prompt_token_ids + tokens)
        row = Row(0, one.sampling, one.prompt_token_ids, one.sampling.stop_token_ids)
        row.seed = request_seed(one, 0)
        for i, token in enumerate(tokens):
            at = logits[len(one.prompt_token_ids) - 1 + i, :]
            assert choose(row, at) == token, (one.request_id, i)
            row.output.append(token)


def choose(row: Row, logits: torch.Tensor) -> int:
    import test_sampler

    before, test_sampler.V = test_sampler.V, logits.shape[0]
    try:
        return row.choose(logits)
    finally:
        test_sampler.V = before


def test_logprobs_come_with_their_rows(llama_folder: Path) -> None:
    runner = make_runner(llama_folder, sharpen=6.0)
    given = prompts(3, seed=2)
    seen: dict[str, list[Any]] = {}

    def watch(plan: Any, result: Any) -> None:
        for row, entry in result.logprobs.items():
            seen.setdefault(plan.requests[row].request_id, []).append((result.tokens[row], entry))

    counts = [2, None, 5]
    requests = [request(f"r{i}", p, logprobs=n, temperature=1.0, seed=i) for i, (p, n) in enumerate(zip(given, counts))]
    got = drive(runner, requests, overlap=True, watch=watch)
    assert sorted(seen) == ["r0", "r2"]
    for i in (0, 2):
        table = full_logits(runner.model, given[i] + got[f"r{i}"]).log_softmax(-1)[len(given[i]) - 1 :]
        assert [token for token, _ in seen[f"r{i}"]] == got[f"r{i}"]
        for position, (token, entry) in enumerate(seen[f"r{i}"]):
            assert len(entry.top_ids) == counts[i]
            assert entry.logprob == pytest.approx(float(table[position, token]), abs=1e-4)
            assert entry.top_ids == table[position].topk(counts[i]).indices.tolist()


def test_an_unseeded_request_depends_on_the_engines_seed(llama_folder: Path) -> None:
    prompt = prompts(1)[0]

    def run(seed: int, name: str) -> list[int]:
        runner = make_runner(llama_folder, sharpen=3.0, seed=seed)
        return drive(runner, [request(name, prompt, temperature=2.0)])[name]

    assert run(0, "a") == run(0, "a")
    assert run(0, "a") != run(0, "b")
