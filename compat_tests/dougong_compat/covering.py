"""Covering arrays: few combinations in which every t values of t different axes meet, as far as constraints allow."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["cover"]

Row = dict[str, Any]


def cover(
    axes: Mapping[str, Sequence[Any]],
    strength: int,
    allowed: Callable[[Row], bool],
    *,
    seed: int = 0,
    tries: int = 12,
) -> list[Row]:
    """Rows over ``axes`` that hold every ``strength``-tuple of values which some allowed row can hold.

    ``allowed`` is asked about partial rows too (axes absent) and must then answer whether the part rules itself out.
    Greedy and deterministic: each new row starts from an uncovered tuple and is the best of ``tries`` completions.
    """
    rng = random.Random(seed)
    names = list(axes)
    uncovered: dict[tuple[tuple[str, int], ...], None] = {}
    for group in itertools.combinations(names, strength):
        for values in itertools.product(*(range(len(axes[name])) for name in group)):
            part = tuple(zip(group, values, strict=True))
            if allowed({name: axes[name][value] for name, value in part}):
                uncovered[part] = None
    combos = list(itertools.combinations(names, strength))
    rows: list[Row] = []
    while uncovered:
        start = next(iter(uncovered))
        best: dict[str, int] | None = None
        best_gain: list[tuple[tuple[str, int], ...]] = []
        for _ in range(tries):
            candidate = _complete(dict(start), axes, names, allowed, rng)
            if candidate is None:
                continue
            gain = [part for combo in combos if (part := tuple((name, candidate[name]) for name in combo)) in uncovered]
            if len(gain) > len(best_gain):
                best, best_gain = candidate, gain
        if best is None:  # no row can hold this tuple, whatever the rest
            del uncovered[start]
            continue
        for part in best_gain:
            del uncovered[part]
        rows.append({name: axes[name][best[name]] for name in names})
    return rows


def _complete(
    start: dict[str, int],
    axes: Mapping[str, Sequence[Any]],
    names: list[str],
    allowed: Callable[[Row], bool],
    rng: random.Random,
) -> dict[str, int] | None:
    """A full row that begins with ``start``, the other axes in random order; None if that led nowhere."""
    chosen = dict(start)
    rest = [name for name in names if name not in chosen]
    rng.shuffle(rest)
    row = {name: axes[name][value] for name, value in chosen.items()}
    for name in rest:
        order = list(range(len(axes[name])))
        rng.shuffle(order)
        for value in order:
            row[name] = axes[name][value]
            if allowed(row):
                chosen[name] = value
                break
        else:
            return None
    return chosen
