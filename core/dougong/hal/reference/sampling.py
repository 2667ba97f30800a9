"""Choosing tokens in plain torch, with random numbers that depend only on (seed, position, token).

The Gumbel-max trick turns a categorical draw into an arg max, so that a row's token does not depend on what shares its
batch. The noise of a token is a hash of (seed, position, token id), so that every device draws the same.
"""

from __future__ import annotations

import torch

__all__ = ["argmax", "gumbel_noise", "mask_top", "sample"]

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64, Steele et al. 2014


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 tensors; products wrap as unsigned ones do."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX[1])
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX[2])
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32.

    seeds [R] int64, positions [R] int64 (index of the token being chosen), tokens [V] or [R, V] int64 -> [R, V].
    """
    row = _mix(seeds + _mix(positions * _signed(_MIX[0])))[:, None]
    bits = _mix(row + tokens * _signed(_MIX[0]))
    # 23 bits and a half are exact in float32, so never 0 and never 1 (24 bits and a half round to 1: infinite noise)
    uniform = (((bits >> 41) & 0x7FFFFF).float() + 0.5) * (2.0**-23)
    return -torch.log(-torch.log(uniform))


def mask_top(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None
) -> torch.Tensor:
    """Set to -inf what top-k, then top-p, then min-p leave out. logits [R, V] float32, changed in place.

    top_k [R] int64 (0: off), top_p [R] and min_p [R] float32. Ties at top-k's edge stay in.
    """
    if top_k is not None:
        vocabulary = logits.shape[-1]
        k = torch.where(top_k <= 0, vocabulary, top_k.clamp(max=vocabulary))
        ordered = logits.sort(dim=-1, descending=True).values
        edge = ordered.gather(-1, (k - 1)[:, None])
        logits.masked_fill_(logits < edge, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        drop = (before >= top_p[:, None]) & (top_p < 1.0)[:, None]
        drop[:, 0] = False
        logits.masked_fill_(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if min_p is not None:
        floor = logits.amax(-1, keepdim=True) + torch.log(min_p)[:, None]
        logits.masked_fill_((logits < floor) & (min_p > 0)[:, None], -torch.inf)
    return logits


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> [R] int64: the lowest id of the largest; NaN counts as the largest."""
    return logits.argmax(-1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Choose one token per row -> [R] int64. Rows of temperature 0 take the arg max (the lowest id among equals).

    logits [R, V] float32, may be changed; temperature [R] float32; top_k, top_p, min_p None where no row uses them;
    seeds, positions [R] int64.
    """
    greedy = temperature <= 0
    best = logits.argmax(-1)
    scaled = logits / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    scaled = mask_top(scaled, top_k, top_p, min_p)
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    drawn = (scaled + gumbel_noise(seeds, positions, tokens)).argmax(-1)
    return torch.where(greedy, best, drawn)
