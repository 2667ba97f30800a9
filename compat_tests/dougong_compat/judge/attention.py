"""Judging attention: against the oracle, bit against bit, or against a needle's known answer."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.needles import build_needle
from dougong_compat.numbers import same_bits
from dougong_compat.oracle import attend, eager
from dougong_compat.outcome import Judgement
from dougong_compat.problem import Problem, build
from dougong_compat.tolerance import Tolerance, judge_attention
from dougong_compat.variants import vary

__all__ = ["against_oracle", "judge", "judge_needle", "judge_variants"]

_Tensors = dict[str, torch.Tensor]


def against_oracle(
    problem: Problem, out: torch.Tensor | None, lse: torch.Tensor | None, tolerance: Tolerance
) -> Judgement:
    """An answer to ``problem`` within the rules of ``tolerance``?"""
    if out is None or out.dtype != problem.dtype:
        return Judgement(False, f"no out in {problem.dtype} came back")
    if problem.params["lse"] and lse is None:
        return Judgement(False, "no lse came back")
    truth = attend(problem)
    ordinary = problem.params["values"] in ("normal", "sharp", "flat")
    return judge_attention(out, lse, truth, eager(problem) if ordinary else None, tolerance)


def judge(request: dict[str, Any], message: dict[str, Any], tensors: _Tensors, tolerance: Tolerance) -> Judgement:
    problem = build(request["params"], request["seed"])
    return against_oracle(problem, tensors.get("out"), tensors.get("lse"), tolerance)


def judge_variants(
    request: dict[str, Any], message: dict[str, Any], tensors: _Tensors, tolerance: Tolerance
) -> Judgement:
    """The first run against the oracle; each other one bit for bit the same in the rows it compares, or, with
    ``mode`` ``oracle``, right by itself."""
    params, seed = request["params"], request["seed"]
    base = vary(params["base"], seed, {})
    first = against_oracle(base, tensors.get("out0"), tensors.get("lse0"), tolerance)
    if not first.ok:
        return Judgement(False, f"before any change: {first.message}", first.margin)
    worst = first.margin or 0.0
    for index, change in enumerate(params["changes"], 1):
        out, lse = tensors.get(f"out{index}"), tensors.get(f"lse{index}")
        if change.get("mode") == "oracle":
            verdict = against_oracle(vary(params["base"], seed, change), out, lse, tolerance)
            if not verdict.ok:
                return Judgement(False, f"after {_describe(change)}: {verdict.message}", verdict.margin)
            worst = max(worst, verdict.margin or 0.0)
            continue
        pairs = [("out", tensors["out0"], out)]
        if "lse0" in tensors and "scale_q" not in change:
            pairs.append(("lse", tensors["lse0"], lse))
        for name, first_run, this_run in pairs:
            before, after = _rows_to_compare(base, change, first_run, this_run)
            if after is None or not same_bits(before, after):
                count = "all" if after is None else int((before.double() != after.double()).sum())
                return Judgement(False, f"{name} changes ({count} elements) after {_describe(change)}", None)
    return Judgement(True, margin=worst)


def _rows_to_compare(
    base: Problem, change: dict[str, Any], before: torch.Tensor, after: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    at = base.q_at
    if "keep" in change:  # the kept rows alone must answer as they did in company
        pick = torch.cat([torch.arange(at[row], at[row + 1]) for row in change["keep"]])
        return before[pick], after
    if "redraw" in change:
        left = [row for row in range(len(base.q_lens)) if row not in change["redraw"]]
        pick = torch.cat([torch.arange(at[row], at[row + 1]) for row in left])
        return before[pick], None if after is None else after[pick]
    return before, after


def _describe(change: dict[str, Any]) -> str:
    return change.get("name") or ", ".join(f"{key}={value}" for key, value in change.items())


def judge_needle(
    request: dict[str, Any], message: dict[str, Any], tensors: _Tensors, tolerance: Tolerance
) -> Judgement:
    problem, expected = build_needle(request["params"], request["seed"])
    out = tensors.get("out")
    if out is None or out.shape != expected.shape or out.dtype != expected.dtype:
        return Judgement(False, "no out of the right shape and dtype came back")
    wrong = (out.double() != expected.double()).any(-1)
    if not bool(wrong.any()):
        return Judgement(True, margin=0.0)
    t, h = (int(i) for i in wrong.nonzero()[0])
    row = next(r for r in range(len(problem.q_lens)) if problem.q_at[r + 1] > t)
    return Judgement(
        False,
        f"out[{t}, {h}] (row {row}: q_len {problem.q_lens[row]}, kv_len {problem.kv_lens[row]}) begins "
        f"{out[t, h, :4].tolist()}, expected {expected[t, h, :4].tolist()} exactly; {int(wrong.sum())} of "
        f"{wrong.numel()} (token, head) pairs are wrong",
    )
