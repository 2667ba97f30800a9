"""From answers to figures: percentiles, throughput, goodput under limits, and a plot."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dougong.cli.bench.load import Answer
from dougong.errors import ConfigError

__all__ = ["parse_slo", "percentiles", "plot_answers", "summarize"]

_METRICS = ("ttft", "tpot", "e2e")


def parse_slo(texts: Sequence[str]) -> dict[str, float]:
    """``["ttft:200 tpot:50"]`` to milliseconds by metric.

    Raises:
        ConfigError: another form or metric.
    """
    limits: dict[str, float] = {}
    for item in (part for text in texts for part in re.split(r"[\s,]+", text) if part):
        name, _, value = item.partition(":")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--slo {item!r}: expected METRIC:MILLISECONDS, e.g. ttft:200.") from error
        if name not in _METRICS or limits[name] <= 0:
            raise ConfigError(f"--slo {item!r}: metrics are {', '.join(_METRICS)}, with milliseconds > 0.")
    return limits


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds: mean, p50, p90, p95, p99 and max, by linear interpolation; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    found = {"mean": statistics.fmean(ordered), "p50": at(0.5), "p90": at(0.9), "p95": at(0.95), "p99": at(0.99)}
    return {name: round(1e3 * value, 3) for name, value in {**found, "max": ordered[-1]}.items()}


def summarize(answers: Sequence[Answer], wall_s: float, slo: dict[str, float]) -> dict[str, Any]:
    """The result of a run."""
    good = [answer for answer in answers if not answer.error]
    outputs = sum(answer.output_tokens for answer in good)
    prompts = sum(answer.prompt_tokens for answer in good)
    per_token = [answer.tpot for answer in good if answer.tpot is not None]
    result: dict[str, Any] = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "wall_s": round(wall_s, 3),
        "requests_per_s": round(len(good) / wall_s, 3),
        "output_tok_s": round(outputs / wall_s, 1),
        "total_tok_s": round((outputs + prompts) / wall_s, 1),
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "peak_concurrency": _peak(good),
        "ttft_ms": percentiles([answer.ttft for answer in good]),
        "tpot_ms": percentiles(per_token),
        "itl_ms": percentiles([gap for answer in good for gap in answer.itl]),
        "e2e_ms": percentiles([answer.e2e for answer in good]),
    }
    if slo:
        met = [answer for answer in good if _meets(answer, slo)]
        result["slo_ms"] = slo
        result["goodput_requests_per_s"] = round(len(met) / wall_s, 3)
        result["goodput_share"] = round(len(met) / max(1, len(answers)), 4)
    errors = Counter(answer.error for answer in answers if answer.error)
    if errors:
        result["errors"] = dict(errors.most_common(5))
    return result


def _meets(answer: Answer, slo: dict[str, float]) -> bool:
    # A single token has no time between tokens, and so nothing to miss.
    values = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2e": answer.e2e}
    return all(1e3 * values[name] <= limit for name, limit in slo.items())


def _peak(answers: Sequence[Answer]) -> int:
    """Most requests that were open at once."""
    changes = sorted([(answer.sent, 1) for answer in answers] + [(answer.done, -1) for answer in answers])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def plot_answers(path: Path, title: str, answers: Sequence[Answer], slo: dict[str, float]) -> None:
    """Draw the distributions of TTFT, ITL and e2e, and tokens per second over time, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'dougong[plots]'") from error
    good = [answer for answer in answers if not answer.error]
    if not good:
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7))
    for place, name, label, values in (
        (axes[0][0], "ttft", "time to first token", [answer.ttft for answer in good]),
        (axes[0][1], "tpot", "between tokens", [gap for answer in good for gap in answer.itl]),
        (axes[1][0], "e2e", "whole request", [answer.e2e for answer in good]),
    ):
        ordered = sorted(1e3 * value for value in values)
        place.plot(ordered, [100 * (index + 1) / len(ordered) for index in range(len(ordered))], color="#1d6b5f")
        if name in slo:
            place.axvline(slo[name], color="#a8321f", linestyle="--", linewidth=1, label=f"SLO {slo[name]:g} ms")
            place.legend(frameon=False)
        place.set(xlabel=f"{label}, ms", ylabel="% of all", ylim=(0, 101))
        place.grid(alpha=0.25)
    start = min(answer.sent for answer in good)
    end = max(answer.done for answer in good)
    width = max((end - start) / 80, 1e-3)
    times = [piece - start for answer in good for piece in answer.pieces]
    axes[1][1].hist(times, bins=80, weights=[1 / width] * len(times), color="#63a99c")
    axes[1][1].set(xlabel="seconds since the start", ylabel="tokens per second")
    axes[1][1].grid(alpha=0.25)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
