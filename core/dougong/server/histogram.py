"""A histogram that takes many equal observations at once, which is how a step's rows come."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["Histogram", "one_two_five"]


class Histogram:
    """Counts by upper bound, in Prometheus' sense. Not thread-safe: one event loop owns it."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(sorted(bounds))
        self.counts = [0] * (len(self.bounds) + 1)
        """The last is for what exceeds every bound."""
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound as Prometheus writes it, observations up to it)."""
        found: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(total)))
        return found


def one_two_five(highest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 … up to ``highest``."""
    found: list[float] = []
    decade = 1
    while decade <= highest:
        found += [float(decade * step) for step in (1, 2, 5) if decade * step <= highest]
        decade *= 10
    return found
