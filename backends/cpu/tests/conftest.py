"""Every test of kernels runs on each instruction set that the library has and this machine can run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dougong_cpu.library import load, unavailable_reason

sys.path.insert(0, str(Path(__file__).parent))

_VARIANTS = [] if unavailable_reason() else [name for name, usable in load().variants.items() if usable]


@pytest.fixture(params=_VARIANTS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    load().select(request.param)
    yield request.param
    load().select(None)
