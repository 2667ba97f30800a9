"""Judging cache writes: the named slots hold the rounded values, every other byte is what it was."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.harness.placement import gather, plane_shape, scatter
from dougong_compat.judge.attention import against_oracle
from dougong_compat.numbers import bits, quantise
from dougong_compat.outcome import Judgement
from dougong_compat.problem import Problem, build, layout_text
from dougong_compat.tolerance import Tolerance
from dougong_compat.writing import incoming

__all__ = ["judge", "judge_roundtrip"]


def judge(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    problem = build(request["params"], request["seed"])
    k, v, slots = incoming(problem, request["seed"])
    texts = layout_text(problem.params)
    names = ["k"] if problem.params["latent"] else ["k", "v"]
    for name, text in zip(names, texts, strict=False):
        values, dim = (k, problem.D) if name == "k" else (v, problem.Dv)
        scale = problem.params[f"{name}_scale"]
        shape = plane_shape(text, problem.num_blocks, problem.block, problem.K, dim, problem.kv_dtype.itemsize)
        before, after = tensors[f"before_{name}"], tensors[f"after_{name}"]
        if tuple(after.shape[:-1]) != shape or after.shape != before.shape:
            return Judgement(False, f"plane {name} has shape {tuple(after.shape)}, expected {shape}")
        verdict = _named(problem, name, text, values, scale, slots, after.view(problem.kv_dtype)[..., 0], dim)
        if not verdict.ok:
            return verdict
        marks = torch.zeros(shape, dtype=problem.kv_dtype)  # of the plane's width: a layout may pack by bytes
        scatter(text, marks, slots, torch.ones(len(slots), problem.K, dim).to(problem.kv_dtype), problem.block)
        moved = (before != after).any(-1) & (marks.float() == 0)
        if bool(moved.any()):
            return Judgement(False, f"write changed {int(moved.sum())} elements of plane {name} outside its slots")
    return Judgement(True, margin=0.0)


def _named(
    problem: Problem, name: str, text: str, values: torch.Tensor, scale: float, slots: torch.Tensor,
    plane: torch.Tensor, dim: int,
) -> Judgement:  # fmt: skip
    got = gather(text, plane, slots, problem.block, problem.K, dim)
    if not problem.quantised:
        wrong = bits(got) != bits(values)
        both_nan = torch.isnan(got.float()) & torch.isnan(values.float())
    else:
        # one unit in the last place of float32 either way: dividing and multiplying by the inverse both round right
        wide = values.float()
        near = [quantise(wide * factor, scale, problem.kv_dtype) for factor in (1.0, 1 - 2.0**-21, 1 + 2.0**-21)]
        wrong = torch.stack([got.float() != option.float() for option in near]).all(0)
        both_nan = torch.isnan(wide) & (torch.isnan(got.float()) | (problem.kv_dtype == torch.int8))
    wrong &= ~both_nan
    if not bool(wrong.any()):
        return Judgement(True)
    t, h, d = (int(i) for i in wrong.nonzero()[0])
    return Judgement(
        False,
        f"slot {int(slots[t])} of plane {name}, head {h}, element {d} holds {float(got[t, h, d])}, expected "
        f"{float(values[t, h, d])} / {scale} in {problem.kv_dtype}; {int(wrong.sum())} elements are wrong",
    )


def judge_roundtrip(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    problem = build({**request["params"], "write": True}, request["seed"])
    return against_oracle(problem, tensors.get("out"), tensors.get("lse"), tolerance)
