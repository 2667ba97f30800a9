"""generate_batch() and its manager: our kernels over transformers' paged cache."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dougong_transformers import paged
from transformers import ContinuousBatchingConfig, GenerationConfig

Pair = Callable[[str], tuple[Any, Any]]
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt_oss"]
GENERATION = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)


def prompts() -> list[list[int]]:
    generator = random.Random(3)
    shared = [generator.randrange(1, 97) for _ in range(18)]
    lengths = [3, 22, 40, 9, 17]
    own = [[generator.randrange(1, 97) for _ in range(length)] for length in lengths]
    return [*own, shared + own[0], shared + own[3], shared + own[0]]


def batched(model: Any, **options: Any) -> list[list[int]]:
    config = ContinuousBatchingConfig(page_size=8, num_blocks=80, max_batch_tokens=32, **options)
    done = model.generate_batch(
        prompts(), generation_config=GENERATION, continuous_batching_config=config, progress_bar=False
    )
    answers = sorted(done.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
    assert not [one.error for one in answers if one.error]
    return [one.generated_tokens for one in answers]


def alone(model: Any) -> list[list[int]]:
    return [
        model.generate(torch.tensor([prompt]), generation_config=GENERATION)[0, len(prompt) :].tolist()
        for prompt in prompts()
    ]


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[pytest.mark.prove] if one in ("qwen3", "mistral") else []) for one in FAMILIES]
)
def test_tokens_are_those_of_transformers_own_attention(family: str, pair: Pair) -> None:
    """Prompts longer than a step's tokens, shared prefixes, windows that wrap, batches that mix all of it."""
    ours, theirs = pair(family)
    assert batched(ours) == alone(theirs)


def test_both_descriptions_of_a_batch_are_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("llama")
    seen: set[str] = set()
    make_step = paged._make_step

    def spy(allocator: Any, given: dict[str, Any], device: torch.device) -> Any:
        if given.get("block_table") is not None:
            seen.add("block table")
        else:
            seen.add("reads" if given["read_index"][0].numel() else "prompts only")
        return make_step(allocator, given, device)

    monkeypatch.setattr(paged, "_make_step", spy)
    want = alone(theirs)
    assert batched(ours) == want
    assert seen == {"block table", "reads", "prompts only"}
    assert batched(ours, max_blocks_per_request=0) == want


def test_a_cache_too_small_for_all(pair: Pair) -> None:
    """Requests are put off and computed again; tokens stay."""
    ours, theirs = pair("qwen3")
    config = ContinuousBatchingConfig(page_size=8, num_blocks=14, max_batch_tokens=16)
    done = ours.generate_batch(
        prompts(), generation_config=GENERATION, continuous_batching_config=config, progress_bar=False
    )
    answers = sorted(done.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
    assert [one.generated_tokens for one in answers] == alone(theirs)


def test_the_manager_streams(pair: Pair) -> None:
    ours, theirs = pair("llama")
    want = alone(theirs)[1]
    config = ContinuousBatchingConfig(page_size=8, num_blocks=40, max_batch_tokens=32)
    with ours.continuous_batching_context_manager(
        generation_config=GENERATION, continuous_batching_config=config
    ) as manager:
        request = manager.add_request(prompts()[1], streaming=True)
        parts = []
        for output in manager:
            if output.request_id == request:
                parts.append(output.generated_tokens)
            if output.is_finished():
                break
    assert parts[-1] == want
    assert len(parts) > 1


def test_other_implementations_are_judged_as_before(pair: Pair) -> None:
    _, theirs = pair("llama")
    theirs.config._attn_implementation_internal = "flex_attention"
    config = ContinuousBatchingConfig(page_size=8, num_blocks=40, max_batch_tokens=32)
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        theirs.init_continuous_batching(generation_config=GENERATION, continuous_batching_config=config)


def test_kernels_are_of_the_thread_that_runs_them() -> None:
    from dougong_transformers import kernels

    seen: list[int] = []
    kernels._store.kernels.clear()
    thread = threading.Thread(target=lambda: seen.append(id(kernels._store.kernels)))
    thread.start()
    thread.join()
    assert seen != [id(kernels._store.kernels)]
