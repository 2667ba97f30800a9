"""Needles: problems whose right answer is known to the bit.

Keys are codes of +1 and -1. A query is its target's code plus a louder one that stands just outside the mask: the
next position, the last one before the window, or what lies in the slot after the row's end. The scale puts at least
60 nats between the target and every other visible key, and between the forbidden key and the target, so that the answer
is the target's V exactly, or, if the forbidden key is seen, the forbidden one's. V holds small whole numbers, none 0,
that encode position and head and are exact in every dtype down to fp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dougong_compat.problem import Problem, build

__all__ = ["MARGIN", "build_needle", "encode_values"]

MARGIN = 60.0
_LOUD = 1.25


def encode_values(positions: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """V [S, heads, dim] of integers in ±1 … ±8, different for every (position, head)."""
    number = positions[:, None, None] * 64 + torch.arange(heads)[None, :, None]
    digit = torch.arange(dim)[None, None, :]
    base = (number >> (3 * (digit % 7))) & 7
    mixed = (number * 2654435761 + digit * 40503 * (1 + digit // 7)) >> 7
    value = torch.where(digit < 7, base, mixed & 7) + 1
    sign = torch.where(((number + digit) & 1) == 0, 1, -1)
    return (value * sign).float()


def build_needle(params: Mapping[str, Any], seed: int) -> tuple[Problem, torch.Tensor]:
    """(problem, expected out [T, H, Dv] in its dtype). ``params['decoy']`` is ``future``, ``window`` or ``stale``.

    ``scale`` and ``k_scale`` are kept at powers of two.
    """
    base = {**params, "scale": 1.0, "values": "normal", "lse": False}
    generator = torch.Generator().manual_seed(seed)
    problem = build({**base, "k_scale": params.get("k_scale", 1.0)}, seed)
    p = problem.params
    K, D, n = problem.K, problem.D, problem.block
    total = problem.kv_at[-1]
    codes = (torch.randint(0, 2, (total, K, D), generator=generator) * 2 - 1).float()
    stale = (torch.randint(0, 2, (len(problem.kv_lens), K, D), generator=generator) * 2 - 1).float()
    values = encode_values(torch.arange(total + len(problem.kv_lens)), K, problem.Dv)
    if p["shared"]:
        for row in range(1, len(problem.kv_lens)):
            at, count = problem.kv_at[row], p["shared"] * n
            codes[at : at + count], values[at : at + count] = codes[:count], values[:count]
    problem.k, problem.v = codes.to(problem.kv_dtype), values[:total].to(problem.kv_dtype)
    k_scale = p["k_scale"] if problem.quantised else 1.0
    v_scale = p["v_scale"] if problem.quantised else 1.0
    expected = torch.zeros(problem.tokens, problem.H, problem.Dv, dtype=problem.dtype)
    q = torch.zeros(problem.tokens, problem.H, D)
    group = problem.H // K
    for row, q_len in enumerate(problem.q_lens):
        span = slice(problem.kv_at[row], problem.kv_at[row + 1])
        for head in range(K):
            keys = torch.cat((codes[span, head], stale[row : row + 1, head]))
            dots = keys @ keys.T * k_scale
            for j in range(q_len):
                token = problem.q_at[row] + j
                seen, decoy = _sight(problem, row, j, p.get("decoy", "future"))
                if not bool(seen.any()):
                    continue
                for h in range(head * group, (head + 1) * group):
                    target, factor = _aim(dots, seen, decoy, generator)
                    q[token, h] = factor * (keys[target] + _LOUD * keys[decoy])
                    expected[token, h] = (values[problem.kv_at[row] + target, head] * v_scale).to(problem.dtype)
    problem.q = q.to(problem.dtype)
    assert torch.equal(problem.q.float(), q), "needle queries are exact in every dtype"
    _plant_stale(problem, stale, values[total:])
    return problem, expected


def _sight(problem: Problem, row: int, j: int, kind: str) -> tuple[torch.Tensor, int]:
    """(visible [kv_len + 1], the forbidden key's index); index kv_len is the slot after the row's end."""
    kv_len, q_len = problem.kv_lens[row], problem.q_lens[row]
    position = kv_len - q_len + j
    keys = torch.arange(kv_len + 1)
    seen = keys < kv_len
    if problem.params["causal"]:
        seen = seen & (keys <= position)
    if problem.window is not None:
        seen = seen & ((keys - position).abs() < problem.window)
    decoy = kv_len
    if kind == "window" and problem.window is not None and position - problem.window >= 0:
        decoy = position - problem.window
    elif kind == "future" and problem.params["causal"]:
        decoy = min(max(position, -1) + 1, kv_len)
    return seen, decoy


def _aim(dots: torch.Tensor, seen: torch.Tensor, decoy: int, generator: torch.Generator) -> tuple[int, float]:
    """A target and a power of two that give the margins on both sides."""
    visible = seen.nonzero()[:, 0]
    score = dots[visible][:, visible] + _LOUD * dots[visible, decoy][:, None]  # [key, target]
    own = score.diagonal()
    others = score - torch.diag(torch.full_like(own, 1e9))
    margin = torch.minimum(own - others.amax(0), dots[decoy, visible] + _LOUD * dots[decoy, decoy] - own)
    good = (margin >= margin.max() * 0.6).nonzero()[:, 0]
    choice = int(good[torch.randint(len(good), (1,), generator=generator)])
    best = float(margin[choice])
    if best <= 0:
        raise ValueError("no target stands out: the needle's head dimension is too small for its length")
    factor = 1.0
    while best * factor < MARGIN:
        factor *= 2
    return int(visible[choice]), factor


def _plant_stale(problem: Problem, stale: torch.Tensor, values: torch.Tensor) -> None:
    """Put each row's forbidden key where a read past its end would meet it: after it in its last block, or, if that
    is full, at the start of a spare block that the table's garbage names."""
    loud, n = [], problem.block
    spare = set(range(problem.scratch, problem.num_blocks))
    for row, kv_len in enumerate(problem.kv_lens):
        count = -(-kv_len // n)
        spare -= set(problem.table[row, :count].tolist())
    for row, kv_len in enumerate(problem.kv_lens):
        k = stale[row].to(problem.kv_dtype)
        v = (values[row] * -1).to(problem.kv_dtype)
        count = -(-kv_len // n)
        if kv_len % n:
            loud.append((int(problem.table[row, count - 1]) * n + kv_len % n, k, v))
        elif spare:
            block = spare.pop()
            problem.table[row, count:] = block
            loud.append((block * n, k, v))
    problem.extra["loud"] = loud
