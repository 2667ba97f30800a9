"""Tables of rotary position embedding, for every scaling that transformers knows by name.

The arithmetic is float32 and in transformers' order, so that tables agree with its modelling code to the last bit
where that code has one answer per position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dougong.errors import ModelLoadError, UnsupportedModelError
from dougong.hal import RopeTable
from dougong.models.config import RopeConfig

__all__ = ["rope_table"]


def rope_table(rope: RopeConfig, max_len: int, device: torch.device | str) -> RopeTable:
    """Cosines and sines of positions 0 … max_len-1.

    Raises:
        UnsupportedModelError: an unknown scaling.
        ModelLoadError: a parameter that the scaling needs is missing or has a wrong length.
    """
    compute = _SCALINGS.get(rope.type)
    if compute is None:
        raise UnsupportedModelError(f"rope type {rope.type!r}: known are {', '.join(_SCALINGS)}.")
    try:
        # Frequencies [R/2], or [max_len, R/2] where they change with the position.
        frequencies, factor = compute(rope, max_len)
    except KeyError as error:
        raise ModelLoadError(f"rope_parameters of type {rope.type!r} in the config lack {error}.") from None
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    if angles.shape[1] * 2 != rope.rotary_dim:
        raise ModelLoadError(
            f"rope_parameters of type {rope.type!r} give {angles.shape[1]} frequencies; {rope.rotary_dim} rotated "
            f"elements need {rope.rotary_dim // 2}."
        )
    table = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)
    return RopeTable(table.to(device), rope.interleaved)


def _exponents(rope: RopeConfig) -> torch.Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


def _plain(rope: RopeConfig) -> torch.Tensor:
    return 1.0 / (rope.theta ** _exponents(rope))


def _default(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    return _plain(rope), 1.0


def _linear(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    return _plain(rope) / float(rope.parameters["factor"]), 1.0


def _dynamic(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """NTK scaling by sequence length. A key stays in the cache as it was rotated, so each position takes the base of
    a sequence that ends with it: the same as decoding token by token, and independent of how a prompt is chunked."""
    factor, dim, trained = float(rope.parameters["factor"]), rope.rotary_dim, rope.max_positions
    plain = _plain(rope)
    if max_len <= trained:
        return plain, 1.0
    lengths = torch.arange(trained + 1, max_len + 1, dtype=torch.float64)
    base = rope.theta * ((factor * lengths / trained) - (factor - 1)) ** (dim / (dim - 2))
    beyond = 1.0 / (base.float()[:, None] ** _exponents(rope)[None, :])
    return torch.cat((plain.expand(trained, -1), beyond)), 1.0


def _llama3(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    given = rope.parameters
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = given["original_max_position_embeddings"]
    plain = _plain(rope)
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > trained / low, plain / factor, plain)
    smooth = (trained / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < trained / high) & ~(wavelength > trained / low)
    return torch.where(medium, between, scaled), 1.0


def _yarn(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    given, dim, theta = rope.parameters, rope.rotary_dim, rope.theta
    trained = given["original_max_position_embeddings"]
    factor = given.get("factor")
    factor = rope.max_positions / trained if factor is None else float(factor)
    attention = given.get("attention_factor")
    if attention is None:
        mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        both = mscale and all_dim
        attention = _mscale(factor, mscale) / _mscale(factor, all_dim) if both else _mscale(factor, 1.0)

    def dimension(rotations: float) -> float:
        return float(dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta)))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    steps = theta ** _exponents(rope)
    keep = 1 - ramp
    return (1.0 / (factor * steps)) * (1 - keep) + (1.0 / steps) * keep, float(attention)


def _mscale(scale: float, mscale: Any) -> float:
    return 1.0 if scale <= 1 else 0.1 * float(mscale) * math.log(scale) + 1.0


def _longrope(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """Short factors when no sequence can outgrow the trained length, long ones otherwise. transformers decides by each
    sequence; a cache whose keys were rotated both ways would be worth nothing, so the engine's bound decides."""
    given = rope.parameters
    trained = given["original_max_position_embeddings"]
    factor = given.get("factor")
    factor = rope.max_positions / trained if factor is None else float(factor)
    attention = given.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained))
    chosen = given["long_factor"] if max_len > trained else given["short_factor"]
    if len(chosen) * 2 != rope.rotary_dim:
        raise ModelLoadError(
            f"longrope has {len(chosen)} factors for {rope.rotary_dim} rotated elements; "
            f"{rope.rotary_dim // 2} are needed."
        )
    steps = rope.theta ** _exponents(rope)
    return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * steps), float(attention)


_SCALINGS: Mapping[str, Callable[[RopeConfig, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
