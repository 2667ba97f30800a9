"""Changes of a problem that must not change the answer's bits (or change it in a known way)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dougong_compat.problem import DEFAULTS, Problem, build

__all__ = ["keep_rows", "vary"]


def vary(base: Mapping[str, Any], seed: int, change: Mapping[str, Any]) -> Problem:
    """``base`` with one change: ``params`` (other parameters), ``scale_q`` (q times f, scale over f), ``redraw``
    (new values for these rows), ``keep`` (these rows only)."""
    params = {**DEFAULTS, **base, **change.get("params", {})}
    if "scale_q" in change:
        params["scale"] = (params["scale"] or params["D"] ** -0.5) / change["scale_q"]
    problem = build(params, seed)
    if "scale_q" in change:
        problem.q = problem.q * change["scale_q"]
    if "redraw" in change:
        other = build(params, seed + 1)
        at = problem.q_at
        for row in change["redraw"]:
            problem.q[at[row] : at[row + 1]] = other.q[at[row] : at[row + 1]]
            span = slice(problem.kv_at[row], problem.kv_at[row + 1])
            problem.k[span], problem.v[span] = other.k[span], other.v[span]
    if "keep" in change:
        return keep_rows(problem, change["keep"])
    return problem


def keep_rows(problem: Problem, rows: list[int]) -> Problem:
    """The same problem with only ``rows``, in that order; cache and table entries as they were."""
    at, kv_at = problem.q_at, problem.kv_at
    pick = [torch.arange(at[row], at[row + 1]) for row in rows]
    tokens = torch.cat(pick) if pick else torch.zeros(0, dtype=torch.int64)
    pick = [torch.arange(kv_at[row], kv_at[row + 1]) for row in rows]
    keys = torch.cat(pick) if pick else torch.zeros(0, dtype=torch.int64)
    lengths = [problem.kv_lens[row] for row in rows]
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    # the rows that are left out keep no blocks: theirs stay poisoned
    return Problem(
        problem.params, problem.dtype, problem.kv_dtype, problem.H, problem.K, problem.D, problem.Dv, problem.scale,
        problem.block, [problem.q_lens[row] for row in rows], lengths, ends,
        problem.q[tokens], problem.k[keys], problem.v[keys], problem.table[rows], problem.slots[tokens],
        problem.num_blocks, [problem.first_live[row] for row in rows], problem.sinks, problem.slopes,
        scratch=problem.scratch,
    )  # fmt: skip
