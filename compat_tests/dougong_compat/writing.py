"""The tokens of a write case: the same in the parent and in the worker."""

from __future__ import annotations

import torch

from dougong_compat.problem import Problem

__all__ = ["incoming"]


def incoming(problem: Problem, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k [T, K, D], v [T, K, Dv] in the model's dtype, slots [T] int64). ``params['slots']`` names the pattern."""
    generator = torch.Generator().manual_seed(seed + 17)
    p = problem.params
    total = problem.num_blocks * problem.block
    free = problem.scratch * problem.block
    pattern = p.get("slots", "scattered")
    count = min(p.get("tokens", 9), total - free)
    if pattern == "scattered":
        slots = (torch.randperm(total - free, generator=generator) + free)[:count]
    elif pattern == "run":  # one request's next tokens, over a block's edge
        slots = torch.arange(count) + free + max(0, problem.block - count // 2)
        slots = slots[slots < total]
    elif pattern == "reversed":
        slots = (torch.arange(count) + free).flip(0)
    elif pattern == "last":  # the pool's very last slots
        slots = torch.arange(total - count, total)
    elif pattern == "scratch":  # real tokens first, then padding that goes to scratch
        pad = min(count // 2, free)
        slots = torch.cat((torch.arange(count - pad) + free, torch.arange(pad)))
    elif pattern == "none":
        slots = torch.zeros(0, dtype=torch.int64)
    else:
        raise ValueError(f"unknown pattern of slots {pattern!r}")
    tokens = slots.numel()
    spread = p.get("spread", 1.0)
    k = torch.randn(tokens, problem.K, problem.D, generator=generator) * spread
    v = torch.randn(tokens, problem.K, problem.Dv, generator=generator) * spread
    if pattern == "scratch":  # padding tokens carry NaN: real ones must not feel it
        k[slots < free], v[slots < free] = float("nan"), float("nan")
    if p["latent"]:
        v = k[..., : problem.Dv]
    return k.to(problem.dtype), v.to(problem.dtype), slots
