"""These tests run in a process of their own: it becomes the Ascend twin before the first of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dougong_ascend.twin import WheelMissing, install

if TYPE_CHECKING:
    from dougong.hal import Backend
    from dougong_ascend.device import AscendDevice

sys.path.insert(0, str(Path(__file__).parent))
try:
    install()
    MISSING = ""
except WheelMissing as error:
    # A developer without a network may go on; continuous integration must not pass by skipping.
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        raise
    MISSING = str(error)

TWIN_FREE = {"test_probe.py", "test_limits.py"}
collect_ignore = [] if not MISSING else [
    name.name for name in os.scandir(os.path.dirname(__file__))
    if name.name.startswith("test_") and name.name not in TWIN_FREE
]  # fmt: skip


def pytest_report_header() -> str:
    return f"Ascend twin: not tested, {MISSING}" if MISSING else "Ascend twin: torch-npu's schemas and shape functions"


@pytest.fixture(scope="session")
def device() -> AscendDevice:
    from dougong_ascend.device import AscendDevice

    found = AscendDevice(0)
    found.setup()
    return found


@pytest.fixture(scope="session")
def backend() -> Backend:
    import dougong_ascend
    from dougong.hal import open_backend
    from dougong.plugins import load_plugins
    from dougong_ascend.twin import plugin

    return open_backend(
        "ascend-twin", plugins=load_plugins(entries=(), extra=[("ascend", dougong_ascend), ("twin", plugin)])
    )
