"""Tokens held against another engine's, step by step, and weights whose tokens show attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
from following import best_two, follow, near_tie, right
from random_weights import write

PROMPTS = [[3, 1], [4, 1, 5], [9]]


def chain(history: list[int]) -> int:
    """A model whose token hangs on all before it."""
    return sum((at + 2) * token for at, token in enumerate(history)) % 97


def generate(prompts: list[list[int]], counts: list[int], wrong_at: frozenset[int] = frozenset()) -> list[list[int]]:
    out = []
    for prompt, count in zip(prompts, counts, strict=True):
        history = list(prompt)
        for _ in range(count):
            token = chain(history)
            history.append((token + 1) % 97 if len(history) in wrong_at else token)
        out.append(history[len(prompt) :])
    return out


REFERENCE = generate(PROMPTS, [12, 12, 12])


def logits(best: float, second: float, ahead: int = 1) -> list[list[tuple[float, float, int]]]:
    """The second best token is the one that `generate` gives where it is wrong."""
    return [[(best, second, (token + ahead) % 97) for token in one] for one in REFERENCE]


def test_an_engine_that_gives_the_same_tokens_is_asked_once() -> None:
    found = follow(PROMPTS, REFERENCE, logits(3, 2), generate)
    assert found["equal"] == found["tokens"] == 36 and found["rounds"] == 1 and right(found)


def test_behind_a_wrong_token_the_engine_goes_on_from_the_references() -> None:
    found = follow(PROMPTS, REFERENCE, logits(3, 2), lambda p, n: generate(p, n, frozenset({5})))
    # Position 5 is step 3, 2 and 4 of the three; all else is right, as it stands behind the reference's tokens.
    assert (found["equal"], found["wrong"], found["near_ties"], found["rounds"]) == (33, 3, 0, 2)
    assert [(one["request"], one["step"]) for one in found["differing"]] == [(0, 3), (1, 2), (2, 4)]
    assert not right(found)


def test_near_ties_are_no_fault_unless_they_are_many() -> None:
    def ties(p: list[list[int]], n: list[int]) -> list[list[int]]:
        return generate(p, n, frozenset({5}))

    found = follow(PROMPTS, REFERENCE, logits(3, 2.95), ties)
    assert (found["near_ties"], found["wrong"]) == (3, 0) and not right(found)
    found = follow(PROMPTS, REFERENCE, logits(3, 2.95, ahead=2), ties)
    assert (found["near_ties"], found["wrong"]) == (0, 3), "the tie was between others"
    assert right({"tokens": 100, "equal": 98, "wrong": 0}) and not right({"tokens": 100, "equal": 97, "wrong": 0})


def test_a_near_tie_is_four_units_in_the_last_place_at_the_best_logit() -> None:
    # bfloat16 has 1/128 of a power of two between neighbours.
    assert near_tie(2.0625, 2.0) and not near_tie(2.078125, 2.0)
    assert near_tie(1.03125, 1.0) and not near_tie(1.0390625, 1.0)
    assert near_tie(0.0, 0.0) and not near_tie(0.1, 0.0)


def test_the_best_logits_come_back_from_log_probabilities() -> None:
    rows = torch.randn(1000) * 0.05
    rows[17], rows[400] = 2.5, 2.25
    best, second, token = best_two(dict(enumerate(rows.log_softmax(-1).tolist())), 1000)
    assert token == 400 and best == pytest.approx(2.5, abs=0.05) and best - second == pytest.approx(0.25, abs=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=500, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    write(tmp_path / "config", tmp_path / "weights", layers=3)
    return tmp_path / "weights"


def test_the_tokens_of_random_weights_show_attention(folder: Path) -> None:
    def zeros(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **more: Any) -> Any:
        return torch.zeros_like(q).transpose(1, 2), None

    AttentionInterface.register("zeros", zeros)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not model.config.tie_word_embeddings
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    ids = torch.randint(0, 500, (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits.float()
        model.set_attn_implementation("zeros")
        without = model(ids).logits.float()
    assert (logits.argmax(-1) == without.argmax(-1)).float().mean() < 0.8
    best = logits.topk(2, -1).values
    near = [near_tie(*pair) for pair in best.flatten(0, 1).tolist()]
    assert sum(near) < 0.15 * len(near)


def test_weights_that_are_there_are_kept(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    write(folder, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
