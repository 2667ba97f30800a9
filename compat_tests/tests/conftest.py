"""Shared by the suite's own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dougong_compat.pool import Target, Worker
from dougong_compat.selftest.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with Worker(Target("honest-tiled", ("dougong_compat.selftest.honest",)), timeout=20.0) as worker:
        worker.start()
        yield Lab(worker)
