"""Small inline SVG plots."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["margin_strip", "stacked_bar"]


def stacked_bar(good: int, bad: int, rest: int) -> str:
    """Passed, failed and refused as shares of one bar."""
    total = max(1, good + bad + rest)
    parts, at = [], 0.0
    for count, colour in ((good, "var(--good)"), (bad, "var(--bad)"), (rest, "var(--skip)")):
        width = 100 * count / total
        if count:
            parts.append(f"<rect x='{at:.2f}' y='0' width='{max(width, 2):.2f}' height='8' fill='{colour}'/>")
        at += width
    label = f"{good} passed, {bad} failed, {rest} refused"
    return (
        "<svg viewBox='0 0 100 8' preserveAspectRatio='none' height='8' style='height:8px' role='img' "
        f"aria-label='{label}'>{''.join(parts)}</svg>"
    )


def margin_strip(values: Sequence[float]) -> str:
    """Cases by margin, 0 to 1 of the bound, as a column of dots per hundredth; the bound is the line at the right."""
    bins = [0] * 50
    for value in values:
        bins[min(49, max(0, int(value * 50)))] += 1
    top = max(bins)
    bars = []
    for index, count in enumerate(bins):
        if count:
            height = 4 + 56 * count / top
            colour = "var(--bad)" if index >= 45 else "var(--warn)" if index >= 30 else "var(--mark)"
            bars.append(
                f"<rect x='{10 + index * 6:.1f}' y='{66 - height:.1f}' width='5' height='{height:.1f}' "
                f"fill='{colour}'/>"
            )
    ticks = "".join(
        f"<text x='{10 + 300 * t:.0f}' y='78' font-size='9' fill='var(--dim)' text-anchor='middle'>{t:g}</text>"
        for t in (0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f"<svg viewBox='0 0 320 82' role='img' aria-label='margins of {len(values)} cases, worst {max(values):.2f}'>"
        "<line x1='10' y1='66.5' x2='310' y2='66.5' stroke='var(--line)'/>"
        "<line x1='310' y1='4' x2='310' y2='66' stroke='var(--bad)' stroke-dasharray='3 2'/>"
        f"{''.join(bars)}{ticks}</svg>"
    )
