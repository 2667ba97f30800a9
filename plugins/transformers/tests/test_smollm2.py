"""A real model: the tokens of transformers' sdpa, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from dougong.models.loading.source import resolve_model

pytestmark = pytest.mark.prove

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "Photosynthesis is the process by which plants turn light into",
]
GENERATION = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture(scope="module")
def load() -> Callable[[str], Any]:
    folder = str(resolve_model("smollm2-135m").folder)

    def model(implementation: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=implementation
        ).eval()

    return model


def test_generate_and_generate_batch(load: Callable[[str], Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m").folder, padding_side="left")
    tokenizer.pad_token_id = 0
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    answers = {}
    for name in ("sdpa", "dougong"):
        model = load(name)
        alone = model.generate(**inputs, generation_config=GENERATION)[:, width:].tolist()
        done = model.generate_batch(
            [tokenizer(text)["input_ids"] for text in TEXTS],
            generation_config=GENERATION,
            continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=16),
            progress_bar=False,
        )
        together = [done[key].generated_tokens for key in sorted(done, key=lambda key: int(key.rsplit("_", 1)[-1]))]
        answers[name] = (alone, together)
    assert answers["dougong"][0] == answers["sdpa"][0]
    assert answers["dougong"][1] == answers["sdpa"][1]


def test_the_bench_runs(load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    from dougong_transformers.bench import main

    assert main(["--workloads", "2:32:4", "--repeats", "1", "--page-size", "16", "--max-batch-tokens", "64"]) == 0
    assert capsys.readouterr().out.count("dougong") == 2
