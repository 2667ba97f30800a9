"""How far an answer may be from the oracle's. A vendor cannot change these rules; ``relaxed`` shows on the badge.

Per row (one token, one head), u the unit roundoff of the output dtype, s the row's visible scores, g the oracle:

    ||y - g|| / ||g||  <=  4u + 2^-24 (32 + 4 max|s| + o / ||g||)         (relaxed: 16u)
    |y| <= 4u max|V|                                           where ||g|| = 0
    mean over rows     <=  1.5 x max(that of eager attention in the same dtype, the mean bound / 6)
    |lse - g|          <=  2^-20 (1 + |g|) + 2^-24 l

The floor in the third rule stands for the rounding of the output and a few float32 units: a tiny case's eager error
can be 0 by luck. o and l are the oracle's ``out_room`` and ``lse_room``, what the rounding of the scores comes to: a
score is known to a few float32 units of what it was summed from, not of what came out. Without them honest kernels fail
where large products cancel and the scores stand near 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dougong_compat.numbers import unit_roundoff
from dougong_compat.oracle import Truth
from dougong_compat.outcome import Judgement

__all__ = ["CLASSES", "Tolerance", "judge_attention", "judge_elements"]


@dataclass(frozen=True)
class Tolerance:
    """A class of tolerance: ``units`` is the factor of u per row, ``mean`` that of eager attention's mean error."""

    name: str
    units: float
    mean: float


CLASSES = {"strict": Tolerance("strict", 4.0, 1.5), "relaxed": Tolerance("relaxed", 16.0, 6.0)}


def judge_attention(
    out: torch.Tensor, lse: torch.Tensor | None, truth: Truth, eager: torch.Tensor | None, tolerance: Tolerance
) -> Judgement:
    """Compare out [T, H, Dv] and lse [T, H] with the oracle's. ``eager``: eager attention's out, for the mean rule."""
    want = truth.out
    u = unit_roundoff(out.dtype)
    if out.shape != want.shape:
        return Judgement(False, f"out has shape {tuple(out.shape)}, expected {tuple(want.shape)}")
    if not out.numel():
        return Judgement(True, margin=0.0)
    y = out.double()
    if not torch.isfinite(y).all():
        t, h, d = (int(i) for i in (~torch.isfinite(y)).nonzero()[0])
        return Judgement(False, f"out[{t}, {h}, {d}] is {float(y[t, h, d])}: not finite", float("inf"))
    norm = want.norm(dim=-1)
    empty = norm == 0
    size = torch.where(empty, torch.ones_like(norm), norm)
    bound = tolerance.units * u + 2.0**-24 * (32 + 4 * truth.max_score + truth.out_room / size)
    relative = (y - want).norm(dim=-1) / size
    margins = relative / bound
    floor = (tolerance.units * u * truth.max_value).clamp_min(1e-300)
    at_zero = y.abs().amax(-1) / floor
    at_zero = torch.where(y.abs().amax(-1) == 0, torch.zeros_like(at_zero), at_zero)
    margins = torch.where(empty, at_zero, margins)
    worst = float(margins.max())
    if worst > 1:
        t, h = divmod(int(margins.argmax()), margins.shape[1])
        return Judgement(
            False,
            f"out[{t}, {h}]: relative error {float(relative[t, h]):.3e} is {worst:.3g} times the bound "
            f"{float(bound[t, h]):.3e}; {int((margins > 1).sum())} of {margins.numel()} rows are outside",
            worst,
        )
    if lse is not None:
        verdict = _judge_lse(lse, truth)
        if not verdict.ok:
            return verdict
        worst = max(worst, verdict.margin or 0.0)
    if eager is not None and bool((~empty).any()):
        other = (eager.double() - want).norm(dim=-1) / size
        allowed = tolerance.mean * max(float(other[~empty].mean()), float(bound[~empty].mean()) / 6)
        mean = float(relative[~empty].mean())
        if mean > allowed:
            return Judgement(
                False,
                f"mean relative error {mean:.3e} is above {allowed:.3e} ({tolerance.mean} times eager attention's)",
                mean / allowed,
            )
    return Judgement(True, margin=worst)


def _judge_lse(lse: torch.Tensor, truth: Truth) -> Judgement:
    want = truth.lse
    if lse.shape != want.shape or lse.dtype != torch.float32:
        return Judgement(False, f"lse is {tuple(lse.shape)} {lse.dtype}, expected {tuple(want.shape)} float32")
    got = lse.double()
    empty = torch.isneginf(want)
    wrong = empty & ~torch.isneginf(got)
    if bool(wrong.any()):
        t, h = (int(i) for i in wrong.nonzero()[0])
        return Judgement(False, f"lse[{t}, {h}] is {float(got[t, h])} where nothing is visible: expected -inf")
    allowed = 2.0**-20 * (1 + want.abs()) + 2.0**-24 * truth.lse_room
    error = torch.where(empty, torch.zeros_like(want), (got - want).abs() / allowed)
    if not bool(torch.isfinite(error).all()) or float(error.max()) > 1:
        error = torch.nan_to_num(error, nan=float("inf"))
        t, h = divmod(int(error.argmax()), error.shape[1])
        return Judgement(
            False,
            f"lse[{t}, {h}] is {float(got[t, h]):.7g}, expected {float(want[t, h]):.7g} "
            f"(bound {float(allowed[t, h]):.2e})",
            float(error[t, h]),
        )
    return Judgement(True, margin=float(error.max()))


def judge_elements(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> Judgement:
    """|got - want| <= bound element by element; ``want`` and ``bound`` float64."""
    if got.shape != want.shape:
        return Judgement(False, f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not got.numel():
        return Judgement(True, margin=0.0)
    error = (got.double() - want).abs() / bound.clamp_min(1e-300)
    error = torch.where(got.double() == want, torch.zeros_like(error), error)
    error = torch.nan_to_num(error, nan=float("inf"))
    worst = float(error.max())
    if worst <= 1:
        return Judgement(True, margin=worst)
    at = int(error.argmax())
    return Judgement(
        False,
        f"{what}: element {at} is {float(got.flatten()[at]):.7g}, expected {float(want.flatten()[at]):.7g} "
        f"(bound {float(bound.expand_as(want).flatten()[at]):.2e}); {int((error > 1).sum())} elements are outside",
        worst,
    )
