"""The models of the engine cases: what makes their tokens a fair question."""

from __future__ import annotations

import random

import pytest
import torch

from dougong_compat.judge.engine import judge
from dougong_compat.tiny_llama import config, logits
from dougong_compat.tolerance import CLASSES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_choice_in_16_bits_is_clear(dtype: torch.dtype) -> None:
    """At every one of 160 positions the best logit is twice the next: rounding cannot change it."""
    draw = random.Random(1)
    tokens = [draw.randrange(config(dtype)["vocab_size"]) for _ in range(160)]
    top = logits(tokens, dtype).topk(2).values
    assert float(top[:, 0].min()) > 60 and float((top[:, 0] - top[:, 1]).min()) > 28


def test_every_token_of_the_past_counts() -> None:
    """One token changed: at least one later choice is another, wherever it stands (but in the last places)."""
    draw = random.Random(2)
    tokens = [draw.randrange(64) for _ in range(120)]
    base = logits(tokens, torch.bfloat16).argmax(1)
    for at in range(0, 100, 9):
        other = list(tokens)
        other[at] ^= 1
        assert int((logits(other, torch.bfloat16).argmax(1) != base)[at:].sum()) >= 1, at


@pytest.mark.parametrize(
    ("dtype", "wrong", "ok"), [("bfloat16", 0, True), ("bfloat16", 1, False), ("float32", 1, False)]
)
def test_one_clear_token_wrong_fails(dtype: str, wrong: int, ok: bool) -> None:
    tokens = [5, 9, 33, 12]
    for _ in range(12):
        tokens.append(int(logits(tokens, getattr(torch, dtype))[-1].argmax()))
    answer = tokens[4:]
    if wrong:
        answer[7] = (answer[7] + 1) % 64
    row = {"prompt": tokens[:4], "tokens": answer, "count": 12, "reason": "length"}
    verdict = judge({"params": {"dtype": dtype}}, {"outputs": [row]}, {}, CLASSES["strict"])
    assert verdict.ok is ok, verdict
