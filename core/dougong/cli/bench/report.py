"""The line that a bench command prints."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dougong.errors import ConfigError

__all__ = ["check_plot", "emit", "plot_bars"]


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


def check_plot(path: Path | None) -> None:
    """Refuse a plot that cannot be drawn before minutes of measuring, not after.

    Raises:
        ConfigError: matplotlib is not installed, or ``path`` is no PNG or lies in a folder that is not there.
    """
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'dougong[plots]'")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: expected a file whose name ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"--plot {path}: {what}. Give the name of a file in a folder that exists")


def plot_bars(path: Path, title: str, unit: str, bars: dict[str, float]) -> None:
    """Draw ``bars`` as a PNG.

    Raises:
        ConfigError: ``path`` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
