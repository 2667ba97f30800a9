"""What `dougong bench perplexity` reports is the model's own perplexity, and what low-bit weights make of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.cli.shell import Command


def lines(text: str) -> dict[str, dict[str, float]]:
    return {line["workload"]["quantization"]: line["result"] for line in map(json.loads, text.splitlines())}


def test_it_is_the_perplexity_that_transformers_gives(command: Command, llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "text").write_text("hello there general " * 12)
    ended = command(
        "bench", "perplexity", "--text", str(tmp_path / "text"), "--model", str(llama), "--dtype", "float32",
        "--quantizations", "none", "--window", "16",
    )  # fmt: skip
    got = lines(ended.out)["none"]
    ids = AutoTokenizer.from_pretrained(llama)((tmp_path / "text").read_text(), add_special_tokens=False).input_ids
    host = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    losses = []
    for at in range(0, len(ids), 16):
        part = torch.tensor([ids[at : at + 16]])
        if part.shape[1] > 1:
            with torch.inference_mode():
                scores = host(part).logits[0, :-1].log_softmax(-1)
            losses += (-scores.gather(-1, part[0, 1:, None])).flatten().tolist()
    assert got["tokens"] == len(losses)
    assert got["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_an_empty_text_is_refused(command: Command, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    ended = command("bench", "perplexity", "--text", str(tmp_path / "empty"), "--model", str(llama), "--window", "16")
    assert ended.code == 2 and "--text has 0 tokens; at least 2 are needed" in ended.err


@pytest.mark.prove
def test_low_bit_weights_keep_the_model_useful(command: Command) -> None:
    docs = Path(__file__).parents[2] / "docs"
    ended = command(
        "bench", "perplexity", "--text", str(docs / "scheduling.md"), "--text", str(docs / "kv-cache.md"),
        "--max-tokens", "2048", "--backend", "cpu",
    )  # fmt: skip
    found = lines(ended.out)
    assert found["int8"]["ratio"] == pytest.approx(1.0, abs=0.01)
    assert found["int4"]["ratio"] == pytest.approx(1.0, abs=0.02)
