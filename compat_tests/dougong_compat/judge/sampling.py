"""Judging sampling: the noise is defined to the bit (a hash of seed, position and token), so the token is too, up to
near ties of perturbed logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dougong_compat.op_inputs import sample_inputs
from dougong_compat.outcome import Judgement
from dougong_compat.tolerance import Tolerance

__all__ = ["judge", "noise"]

_Words = npt.NDArray[np.uint64]
_Reals = npt.NDArray[np.float64]

_GOLDEN, _A, _B = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: _Words) -> _Words:
    x = (x ^ (x >> np.uint64(30))) * _A
    x = (x ^ (x >> np.uint64(27))) * _B
    mixed: _Words = x ^ (x >> np.uint64(31))
    return mixed


def noise(seeds: npt.NDArray[Any], positions: npt.NDArray[Any], vocabulary: int) -> _Reals:
    """Gumbel noise [R, V] from splitmix64 in unsigned 64-bit arithmetic."""
    with np.errstate(over="ignore"):
        row = _mix(seeds.astype(np.uint64) + _mix(positions.astype(np.uint64) * _GOLDEN))[:, None]
        mixed = _mix(row + np.arange(vocabulary, dtype=np.uint64)[None, :] * _GOLDEN)
    uniform = ((mixed >> np.uint64(40)).astype(np.float64) + 0.5) * 2.0**-24
    drawn: _Reals = -np.log(-np.log(uniform))
    return drawn


def judge(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    params = request["params"]
    x = sample_inputs(params, request["seed"])
    ids = tensors.get("ids")
    if ids is None or ids.dtype != torch.int64 or ids.shape != (params["R"],):
        return Judgement(False, "expected one int64 id per row")
    logits = x["logits"].double().numpy()
    drawn = noise(x["seeds"].numpy(), x["positions"].numpy(), params["V"])
    for row, token in enumerate(ids.tolist()):
        if not 0 <= token < params["V"]:
            return Judgement(False, f"row {row}: id {token} is not in the vocabulary of {params['V']}")
        if float(x["temperature"][row]) <= 0:
            best = int(logits[row].argmax())
            if token != best:
                return Judgement(False, f"row {row} is greedy: id {token}, expected {best} (the lowest among equals)")
            continue
        scaled = logits[row] / float(x["temperature"][row])
        loose, tight = (_allowed(scaled, x, row, slack) for slack in (1e-5, -1e-5))
        if not loose[token]:
            return Judgement(False, f"row {row}: id {token} is outside top-k, top-p or min-p")
        score = scaled + drawn[row]
        best_score = score[tight].max() if tight.any() else score[loose].max()
        if score[token] < best_score - 1e-4 * (1 + abs(best_score)):
            return Judgement(
                False,
                f"row {row}: id {token} has perturbed logit {score[token]:.5f}, the best allowed {best_score:.5f}",
            )
    if "alone" in tensors and not torch.equal(tensors["alone"], ids):
        return Judgement(False, "a row's token depends on what shares its batch")
    return Judgement(True, margin=0.0)


def _allowed(scaled: _Reals, x: dict[str, torch.Tensor], row: int, slack: float) -> npt.NDArray[np.bool_]:
    """Tokens that top-k, then top-p, then min-p leave in; ``slack`` widens (or narrows) every edge."""
    keep: npt.NDArray[np.bool_] = np.isfinite(scaled)
    values = np.where(keep, scaled, -np.inf)
    if "top_k" in x and int(x["top_k"][row]) > 0:
        edge = np.sort(values)[::-1][min(int(x["top_k"][row]), len(values)) - 1]
        keep &= values >= edge - (max(slack, 0.0))
    if "top_p" in x and float(x["top_p"][row]) < 1:
        order = np.argsort(-np.where(keep, values, -np.inf), kind="stable")
        weights = np.exp(np.where(keep, values, -np.inf)[order] - values[keep].max())
        share = weights / weights.sum()
        before = np.cumsum(share) - share
        chosen = before < float(x["top_p"][row]) + slack
        chosen[0] = True
        allowed = np.zeros_like(keep)
        allowed[order[chosen]] = True
        keep &= allowed
    if "min_p" in x and float(x["min_p"][row]) > 0:
        keep &= values >= values[keep].max() + np.log(float(x["min_p"][row])) - slack
    return keep
