"""The line that a bench command prints."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dougong.errors import ConfigError

__all__ = ["emit", "plot_bars"]


def emit(bench: str, workload: dict[str, Any], result: dict[str, Any], *, device: dict[str, Any]) -> dict[str, Any]:
    """Print and return one JSON line: what was measured, on what, with which versions."""
    versions = {}
    for name in ("dougong", "torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    line = {
        "bench": bench,
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "host": {"machine": platform.machine(), "python": platform.python_version()},
        "versions": versions,
        "workload": workload,
        "result": result,
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)
    return line


def plot_bars(path: Path, title: str, unit: str, bars: dict[str, float]) -> None:
    """Draw ``bars`` as a PNG.

    Raises:
        ConfigError: matplotlib is not installed (says how to get it), or ``path`` cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'dougong[plots]'") from error
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(bars) + 1.2))
    axes.barh(list(bars), list(bars.values()), color="#3b6ea5")
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error}") from error
    pyplot.close(figure)
