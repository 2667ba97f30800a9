"""Whole runs: the same greedy tokens as each request computed alone, whatever happens around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from execution_harness import drive, full_logits, greedy_alone, host_backend, make_runner, prompts, request

from dougong.errors import ConfigError, KernelSelectionError, NumericalError
from dougong.hal.selection import Candidate
from dougong.plugins import ABI, KernelSpec

COUNT = 10


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"num_kv_blocks": 18},  # little room: requests are preempted
        {"max_num_seqs": 1},
        {"block_size": 16, "num_kv_blocks": 20},
    ],
    ids=["plain", "chunks", "preempted", "alone", "blocks of 16"],
)
def test_greedy_tokens_are_those_of_each_request_alone(
    llama_folder: Path, options: dict[str, Any], overlap: bool
) -> None:
    runner = make_runner(llama_folder, **options)
    given = prompts(7)
    requests = [request(f"r{i}", prompt, max_tokens=COUNT) for i, prompt in enumerate(given)]
    got = drive(runner, requests, overlap=overlap)
    assert any(one.num_preemptions for one in requests) == (options.get("num_kv_blocks") == 18)
    for i, prompt in enumerate(given):
        assert len(got[f"r{i}"]) == COUNT
        assert got[f"r{i}"] == greedy_alone(runner.model, prompt, got[f"r{i}"])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_windows_and_full_attention_keep_to_their_own_blocks(gemma_folder: Path, overlap: bool, caching: bool) -> None:
    runner = make_runner(gemma_folder)
    assert [group.spec.window for group in runner.groups] == [None, 8]
    assert [group.layers for group in runner.groups] == [(1, 3), (0, 2)]
    given = prompts(5, seed=3)
    given.append(given[0] + [5, 6])
    requests = [request(f"r{i}", prompt, max_tokens=20) for i, prompt in enumerate(given)]
    got = drive(runner, requests, overlap=overlap, prefix_caching=caching, stagger=3)
    for i, prompt in enumerate(given):
        assert len(got[f"r{i}"]) == 20
        assert got[f"r{i}"] == greedy_alone(runner.model, prompt, got[f"r{i}"])


def test_a_provider_for_what_is_no_op_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernel_providers names silu; ops are linear.*silu_mul"):
        make_runner(llama_folder, kernel_providers={"silu": "cpu-native"})
    with pytest.raises(ConfigError, match="attention_provider='mine'"):
        make_runner(llama_folder, kernel_providers={"attention": "mine"})
    with pytest.raises(KernelSelectionError, match=r"(?s)silu_mul.*provider 'mine' was asked for"):
        make_runner(llama_folder, kernel_providers={"silu_mul": "mine"})


def test_the_reference_is_not_taken_in_silence(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_runner(llama_folder)
    assert not caplog.records  # a backend without kernels
    backend = host_backend()
    spec = KernelSpec(op="attention", provider="mine", abi=ABI, target="mine:Mine", unavailable="the SDK is too old")
    backend.candidates["attention"] = [Candidate("mine", spec)]
    make_runner(llama_folder, backend=backend)
    assert "torch reference, which is slow" in caplog.text
    assert "the SDK is too old" in caplog.text


def test_siblings_share_the_prompt_and_then_part(llama_folder: Path) -> None:
    runner = make_runner(llama_folder)
    prompt = prompts(1, low=10, high=10)[0]
    first = request("a", prompt, temperature=1.0, seed=4, max_tokens=6)
    others = [first.sibling(name) for name in "bc"]
    got = drive(runner, [first, *others])
    assert len({tuple(tokens) for tokens in got.values()}) == 3
    alone = drive(make_runner(llama_folder), [request("z", prompt, temperature=1.0, seed=4, max_tokens=6)])
    assert alone["z"] == got["a"]


def test_a_row_of_nan_fails_alone(llama_folder: Path) -> None:
    runner = make_runner(llama_folder)
    plain = runner.model.logits
    broken = {"rows": [1]}

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out = plain(hidden)
        if out.shape[0] == 3:
            out[broken["rows"]] = torch.nan
        return out

    given = prompts(3)
    good = drive(runner, [request(f"r{i}", prompt) for i, prompt in enumerate(given)])
    runner.model.logits = logits  # type: ignore[method-assign]
    errors: dict[str, Exception] = {}

    def watch(plan: Any, result: Any) -> None:
        for row, error in result.errors.items():
            errors[plan.requests[row].request_id] = error
            assert result.tokens[row] is None

    got = drive(runner, [request(f"r{i}", prompt) for i, prompt in enumerate(given)], watch=watch)
    assert len(errors) == 1
    ((name, error),) = errors.items()
    assert isinstance(error, NumericalError)
    assert "NaN" in str(error)
    for i in range(3):
        assert (got[f"r{i}"] == good[f"r{i}"]) == (f"r{i}" != name)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"num_kv_blocks": 18}])
def test_prompt_logprobs_are_exact_over_chunks_and_preemptions(
    llama_folder: Path, options: dict[str, Any], overlap: bool
) -> None:
    runner = make_runner(llama_folder, **options)
    given = prompts(5, seed=5, low=8, high=24)
    shown: dict[str, list[Any]] = {}

    def watch(plan: Any, result: Any) -> None:
        for row, entries in result.prompt_logprobs.items():
            shown.setdefault(plan.requests[row].request_id, []).extend(entries)

    requests = [request(f"r{i}", p, prompt_logprobs=3, max_tokens=12) for i, p in enumerate(given)]
    drive(runner, requests, overlap=overlap, prefix_caching=False, watch=watch)
    for i, prompt in enumerate(given):
        expected = full_logits(runner.model, prompt).log_softmax(-1)
        entries = shown[f"r{i}"]
        assert [token for token, _ in entries] == prompt[1:]
        for position, (token, entry) in enumerate(entries):
            row = expected[position]
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert entry.rank == int((row > row[token]).sum()) + 1
            assert entry.top_ids == row.topk(3).indices.tolist()
            assert entry.top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_timings_cover_the_step(llama_folder: Path) -> None:
    runner = make_runner(llama_folder)
    seen = []
    drive(runner, [request("a", [3, 4, 5])], watch=lambda plan, result: seen.append(plan.total_tokens))
    assert seen[0] == 3
    assert seen[1:] == [1] * 7


def test_a_closed_runner_lets_go_of_its_cache(llama_folder: Path) -> None:
    runner = make_runner(llama_folder)
    runner.close()
    runner.close()
    assert not runner._parts.context.caches
