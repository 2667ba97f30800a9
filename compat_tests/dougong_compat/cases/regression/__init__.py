"""One case or more per entry of the catalogue of real bugs, named after the upstream report."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import WITHOUT

__all__ = ["MODULES", "WITHOUT", "collect"]

MODULES = ("addressing", "data", "masking", "geometry", "reduction", "state")


def collect() -> Iterator[Case]:
    for name in MODULES:
        yield from importlib.import_module(f"dougong_compat.cases.regression.{name}").collect()
