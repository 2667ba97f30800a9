"""The oracle: attention in float64 over contiguous, already rounded K and V. No paging, no core code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dougong_compat.problem import Problem

__all__ = ["Truth", "attend", "eager"]


@dataclass
class Truth:
    """out [T, H, Dv] and lse [T, H] float64; max_score, max_value [T, H]: the largest |score| and |V| seen.

    out_room, lse_room [T, H]: how far rounding in the scores may carry a row's out (its norm) and its LSE, in units of
    2^-24. Error e_j in key j's score moves the LSE by p_j e_j, p_j the key's share of the softmax, and out by
    p_j e_j (v_j - out). The first adds up, the second as the root of the squares.
    """

    out: torch.Tensor
    lse: torch.Tensor
    max_score: torch.Tensor
    max_value: torch.Tensor
    out_room: torch.Tensor
    lse_room: torch.Tensor

    @classmethod
    def empty(cls, tokens: int, heads: int, dim: int) -> Truth:
        """Of rows that see nothing."""
        out, lse, *rest = (torch.zeros(tokens, heads, *more, dtype=torch.float64) for more in ((dim,), *[()] * 5))
        return cls(out, lse - torch.inf, *rest)


def attend(problem: Problem) -> Truth:
    """Rule by rule as the contract says: scale, softcap, ALiBi, mask, softmax; a sink joins the denominator only."""
    truth = Truth.empty(problem.tokens, problem.H, problem.Dv)
    k_scale, v_scale = _scales(problem)
    head = torch.arange(problem.H) // (problem.H // problem.K)
    at = problem.q_at
    for row, (q_len, kv_len) in enumerate(zip(problem.q_lens, problem.kv_lens, strict=True)):
        if not q_len or not kv_len:
            continue
        span = slice(problem.kv_at[row], problem.kv_at[row + 1])
        q = problem.q[at[row] : at[row + 1]].double()
        k = (problem.k[span].double() * k_scale)[:, head]
        v = (problem.v[span].double() * v_scale)[:, head]
        scores = torch.einsum("qhd,shd->qhs", q, k) * problem.scale
        errors = _score_errors(problem, q, k, scores)
        _one_row(problem, truth, slice(at[row], at[row + 1]), scores, errors, v, kv_len - q_len)
    return truth


def _score_errors(problem: Problem, q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Six deviations of what rounding to float32 does to each score [q, H, S], in units of 2^-24.

    A score s is a sum of D products t_d. In any order the partial sums go from 0 to s and wander on the way: their
    squares add up to about D (s^2 / 3 + sum t^2 / 6). Each is rounded, by a deviation of 2^-24 / sqrt(3) of its size. A
    softcap's tanh is made of exp, and so is off by 2 units of 1 (4 times the cap are allowed).
    """
    squares = torch.einsum("qhd,shd->qhs", q**2, k**2) * problem.scale**2
    cap: float = problem.params["softcap"] or 0.0
    return 2 * float(problem.D**0.5) * torch.sqrt(scores**2 + squares / 2) + 4 * cap


def _one_row(
    problem: Problem,
    truth: Truth,
    where: slice,
    scores: torch.Tensor,
    errors: torch.Tensor,
    v: torch.Tensor,
    offset: int,
) -> None:
    """Fill a row's part of ``truth``."""
    q_len, _, kv_len = scores.shape
    p = problem.params
    distance = torch.arange(kv_len)[None, :] - (offset + torch.arange(q_len))[:, None]
    if p["softcap"] is not None:
        scores = p["softcap"] * torch.tanh(scores / p["softcap"])
    if problem.slopes is not None:
        scores = scores + problem.slopes.double()[None, :, None] * distance[:, None, :]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if p["causal"]:
        visible &= distance <= 0
    if p["window"] is not None:
        visible &= distance.abs() < p["window"]
    seen = visible[:, None, :].expand_as(scores)
    truth.max_score[where] = torch.where(seen, scores.abs(), 0.0).amax(-1)
    scores = torch.where(seen, scores, -torch.inf)
    top = scores.amax(-1)
    if problem.sinks is not None:
        top = torch.maximum(top, problem.sinks.double())
    top = torch.where(torch.isneginf(top), 0.0, top)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    truth.lse[where] = torch.log(total) + top
    truth.lse_room[where] = (weights * errors).sum(-1) / torch.where(total > 0, total, 1.0)
    if problem.sinks is not None:
        total = total + torch.exp(problem.sinks.double() - top)
    weights = weights / torch.where(total > 0, total, 1.0)[..., None]
    out = torch.einsum("qhs,shd->qhd", weights, v)
    truth.out[where] = out
    apart = (v**2).sum(-1).T - 2 * torch.einsum("qhd,shd->qhs", out, v) + (out**2).sum(-1)[..., None]
    truth.out_room[where] = ((weights * errors) ** 2 * apart.clamp_min(0)).sum(-1).sqrt()
    if visible.all():
        truth.max_value[where] = v.abs().amax((0, 2))
    else:
        biggest = v.abs().amax(-1).T[None].expand_as(seen.to(v.dtype))
        truth.max_value[where] = torch.where(seen, biggest, 0.0).amax(-1)


def _scales(problem: Problem) -> tuple[float, float]:
    """What cached values are multiplied by: the layer's scales where the cache has its own dtype, else nothing."""
    if not problem.quantised:
        return 1.0, 1.0
    p = problem.params
    return float(torch.tensor(p["k_scale"])), float(torch.tensor(p["v_scale"]))


def eager(problem: Problem) -> torch.Tensor:
    """Attention as models write it, in the problem's own dtype (softmax in float32): out [T, H, Dv].

    Its error against the oracle is what the mean rule compares with.
    """
    dtype, p = problem.dtype, problem.params
    out = torch.zeros(problem.tokens, problem.H, problem.Dv, dtype=dtype)
    k_scale, v_scale = _scales(problem)
    head = torch.arange(problem.H) // (problem.H // problem.K)
    at = problem.q_at
    for row, (q_len, kv_len) in enumerate(zip(problem.q_lens, problem.kv_lens, strict=True)):
        if not q_len or not kv_len:
            continue
        span = slice(problem.kv_at[row], problem.kv_at[row + 1])
        q = problem.q[at[row] : at[row + 1]].transpose(0, 1)
        k, v = problem.k[span][:, head], problem.v[span][:, head]
        if problem.quantised:
            k, v = (k.float() * k_scale).to(dtype), (v.float() * v_scale).to(dtype)
        scores = (q @ k.permute(1, 2, 0)).float() * problem.scale
        distance = torch.arange(kv_len)[None, :] - (kv_len - q_len + torch.arange(q_len))[:, None]
        if p["softcap"] is not None:
            scores = p["softcap"] * torch.tanh(scores / p["softcap"])
        if problem.slopes is not None:
            scores = scores + problem.slopes[:, None, None] * distance[None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if p["causal"]:
            hidden |= distance > 0
        if p["window"] is not None:
            hidden |= distance.abs() >= p["window"]
        scores = scores.masked_fill(hidden[None], -torch.inf)
        if problem.sinks is not None:
            scores = torch.cat((scores, problem.sinks[:, None, None].expand(-1, q_len, 1)), dim=-1)
        weights = torch.nan_to_num(scores.softmax(-1), nan=0.0)[..., :kv_len].to(dtype)
        out[at[row] : at[row + 1]] = (weights @ v.transpose(0, 1)).transpose(0, 1)
    return out
