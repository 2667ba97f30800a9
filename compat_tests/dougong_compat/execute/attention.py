"""Attention cases: one call, several variants of one call, or a needle."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.harness.call import Call
from dougong_compat.problem import Problem, build
from dougong_compat.variants import vary

__all__ = ["execute", "execute_needle", "execute_variants", "run_problem"]


def run_problem(ctx: Any, problem: Problem, message: dict[str, Any], *, declared: bool) -> tuple[Any, Any]:
    """Set up, write the new tokens through the kernel where asked, run; (out, lse) on the host."""
    call = Call(ctx, problem, declared=declared)
    message["provider"] = call.choice.candidate.label
    if problem.params["write"]:
        new = torch.cat([torch.arange(problem.tokens)])
        k, v = new_tokens(problem)
        call.write(k[new], v[new], problem.slots)
    return call.run(message["findings"])


def new_tokens(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the batch's new tokens in the model's dtype, such that rounding gives back the cached values."""
    k_rows: list[torch.Tensor] = []
    v_rows: list[torch.Tensor] = []
    for row, q_len in enumerate(problem.q_lens):
        end = problem.kv_at[row + 1]
        real = min(q_len, problem.kv_lens[row])
        pad = q_len - real
        for rows, plane in ((k_rows, problem.k), (v_rows, problem.v)):
            values = plane[end - real : end]
            rows.append(torch.cat((torch.zeros(pad, *plane.shape[1:], dtype=plane.dtype), values)))
    empty = torch.zeros(0, problem.K, problem.D, dtype=problem.dtype)
    k = torch.cat(k_rows) if k_rows else empty
    v = torch.cat(v_rows) if v_rows else empty[..., : problem.Dv]
    if problem.quantised:
        p = problem.params
        k, v = k.float() * p["k_scale"], v.float() * p["v_scale"]
    return k.to(problem.dtype), v.to(problem.dtype)


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    problem = build(request["params"], request["seed"])
    out, lse = run_problem(ctx, problem, message, declared=request.get("declared", True))
    tensors["out"] = out
    if lse is not None:
        tensors["lse"] = lse


def execute_variants(
    ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Run the problem and each change of it; the parent compares."""
    for index, change in enumerate([{}, *request["params"]["changes"]]):
        problem = vary(request["params"]["base"], request["seed"], change)
        out, lse = run_problem(ctx, problem, message, declared=request.get("declared", True))
        tensors[f"out{index}"] = out
        if lse is not None:
            tensors[f"lse{index}"] = lse


def execute_needle(
    ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    from dougong_compat.needles import build_needle

    problem, _ = build_needle(request["params"], request["seed"])
    out, _ = run_problem(ctx, problem, message, declared=request.get("declared", True))
    tensors["out"] = out
