"""Judging replays: each must be what a fresh call would give."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.judge.attention import against_oracle
from dougong_compat.outcome import Judgement
from dougong_compat.replays import replay_problems
from dougong_compat.tolerance import Tolerance

__all__ = ["judge"]


def judge(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    worst = 0.0
    for turn, problem in enumerate(replay_problems(request["params"], request["seed"])):
        verdict = against_oracle(problem, tensors.get(f"out{turn}"), tensors.get(f"lse{turn}"), tolerance)
        if not verdict.ok:
            return Judgement(False, f"replay {turn}: {verdict.message}", verdict.margin)
        worst = max(worst, verdict.margin or 0.0)
    return Judgement(True, margin=worst)
