"""Vectors that prompts were turned into."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["unit"]


def unit(vector: Sequence[float]) -> list[float]:
    """The vector with length 1; one of length 0 stays."""
    length = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]
