"""The problems of a replay case: the same number of tokens each time, everything else may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dougong_compat.problem import Problem, build

__all__ = ["replay_problems"]


def replay_problems(params: Mapping[str, Any], seed: int) -> list[Problem]:
    """The captured problem first, then one per entry of ``params['replays']`` (changed parameters)."""
    base = {key: value for key, value in params.items() if key not in ("replays", "eager")}
    problems = [build(base, seed)]
    for turn, change in enumerate(params["replays"], 1):
        problems.append(build({**base, **change}, seed + turn))
    assert len({tuple(problem.q_lens) for problem in problems}) == 1, "a graph keeps its shape"
    if params.get("sinks") or params.get("alibi"):
        for problem in problems:  # a layer's arguments do not change between replays
            problem.sinks, problem.slopes = problems[0].sinks, problems[0].slopes
    return problems
