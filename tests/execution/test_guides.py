"""Guided rows through the whole runner: the masks are of the right place, and nobody else sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from execution_harness import drive, full_logits, make_runner, prompts, request
from fake_grammar import FakeGrammar

from dougong.errors import EngineError
from dougong.scheduling import Request
from dougong.types import SamplingParams, StructuredOutput

GUIDED = {"structured": StructuredOutput(regex="x")}  # what it says does not matter here: the grammar is a fake


def guided(name: str, prompt: list[int], grammar: FakeGrammar, **sampling: Any) -> Request:
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, **GUIDED, **sampling}
    return Request(name, prompt, SamplingParams(**values), grammar=grammar)


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 9, "num_kv_blocks": 18}], ids=["plain", "preempted"]
)
def test_guided_and_free_rows_with_and_without_overlap(llama_folder: Path, options: dict[str, Any]) -> None:
    given = prompts(6, seed=4)
    grammars: list[FakeGrammar] = []

    def make() -> list[Request]:
        grammars[:] = [FakeGrammar(modulus=4), FakeGrammar(modulus=7)]
        return [
            request("free", given[0], max_tokens=12),
            guided("four", given[1], grammars[0]),
            request("random", given[2], max_tokens=12, temperature=1.0, seed=3),
            guided("seven", given[3], grammars[1], temperature=0.8, seed=9, logprobs=2),
            request("late", given[4], max_tokens=12),
            guided("bias", given[5], grammars[0], logit_bias={8: 5.0}, repetition_penalty=1.2),
        ]

    runner = make_runner(llama_folder, sharpen=6.0, **options)
    in_turn = drive(runner, make())
    if options:
        assert sum(len(grammar.started) for grammar in grammars) > 3, "nobody was preempted: the test is void"
    ahead = drive(make_runner(llama_folder, sharpen=6.0, **options), make(), overlap=True)
    assert ahead == in_turn
    # The free ones do not notice the others.
    alone = drive(make_runner(llama_folder, sharpen=6.0), [one for one in make() if one.grammar is None])
    assert {name: in_turn[name] for name in alone} == alone
    # The guided ones take the likeliest of what is allowed.
    tokens = in_turn["four"]
    logits = full_logits(runner.model, given[1] + tokens)[len(given[1]) - 1 :]
    for place, token in enumerate(tokens):
        assert token == max(FakeGrammar(modulus=4).allowed(place), key=lambda t: float(logits[place, t]))
    assert all((token + place) % 7 == 0 for place, token in enumerate(in_turn["seven"]))
    # Where the host computes, masks are made beside its forward.
    assert all(name.startswith("dougong-masks") for name in grammars[0].threads)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_end_of_a_grammar_and_its_failure_are_reported(llama_folder: Path, overlap: bool) -> None:
    runner = make_runner(llama_folder)
    given = prompts(3, seed=1)
    seen: dict[str, list[tuple[int | None, bool, Exception | None]]] = {}

    def watch(plan: Any, result: Any) -> None:
        for row, one in enumerate(plan.requests):
            seen.setdefault(one.request_id, []).append(
                (result.tokens[row], row in result.complete, result.errors.get(row))
            )

    requests = [
        guided("short", given[0], FakeGrammar(length=3)),
        guided("broken", given[1], FakeGrammar(breaks_at=2)),
        request("free", given[2]),
    ]
    got = drive(runner, requests, overlap=overlap, watch=watch)
    assert [complete for _, complete, _ in seen["short"]][:3] == [False, False, True]
    assert sum(complete for _, complete, _ in seen["short"]) == 1, "the end is told once"
    assert len(got["broken"]) == 2
    assert isinstance(seen["broken"][2][2], EngineError) and "too much work" in str(seen["broken"][2][2])
    assert got["free"] == drive(make_runner(llama_folder), [request("free", given[2])])["free"]


def test_a_grammar_that_leaves_nothing_ends_its_own_request(llama_folder: Path) -> None:
    runner = make_runner(llama_folder)
    dead_end = FakeGrammar(modulus=1000)  # nothing but token 0 at place 0
    errors: list[Exception] = []
    got = drive(
        runner,
        [guided("none", [5, 6, 7], dead_end), request("free", [5, 6, 7])],
        watch=lambda plan, result: errors.extend(result.errors.values()),
    )
    assert got["none"] == [0] and len(got["free"]) == 8
    assert len(errors) == 1 and "structured" in str(errors[0])
