"""Judging the engine: every token is the float64 model's arg max given the tokens before it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from dougong_compat.numbers import dtype_of, unit_roundoff
from dougong_compat.outcome import Judgement
from dougong_compat.tiny_llama import logits
from dougong_compat.tolerance import Tolerance

__all__ = ["judge"]


@lru_cache(maxsize=4096)
def _truth(tokens: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return logits(list(tokens), dtype)


def _near(highest: float, dtype: torch.dtype) -> float:
    """Logits no further apart than this are a near tie: 4 ulp of the highest, which is 8u of its power of two."""
    if dtype == torch.float32:
        return 1e-4
    return 8 * unit_roundoff(dtype) * 2.0 ** math.floor(math.log2(max(abs(highest), 1e-30)))


def judge(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    """Each token behind the engine's own tokens before it: equal wherever the reference's top two logits are clear of
    each other, and in 98% of all places."""
    dtype = dtype_of(request["params"]["dtype"])
    rows = message.get("outputs") or []
    if not rows:
        return Judgement(False, "no request came to an end")
    exact = total = 0
    for index, row in enumerate(rows):
        prompt, tokens = row["prompt"], row["tokens"]
        if len(tokens) != row["count"] or not row["reason"].endswith(("length", "LENGTH")):
            return Judgement(
                False, f"request {index} ended with {len(tokens)} of {row['count']} tokens: {row['reason']}"
            )
        truth = _truth((*prompt, *tokens), dtype)
        for step, token in enumerate(tokens):
            here = truth[len(prompt) + step - 1]
            best = int(here.argmax())
            total += 1
            exact += token == best
            top = here.topk(2).values
            if token != best and float(top[0] - top[1]) > _near(float(top[0]), dtype):
                return Judgement(
                    False,
                    f"request {index}, token {step}: {token}, expected {best} (logits {float(here[token]):.4f} and "
                    f"{float(here[best]):.4f})",
                )
    if exact < 0.98 * total:
        return Judgement(False, f"only {exact} of {total} tokens are the reference's")
    return Judgement(True, margin=1 - exact / total)
