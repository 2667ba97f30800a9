"""These tests run in a process of their own: it becomes the XPU twin before the first of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dougong_xpu.twin import install

if TYPE_CHECKING:
    from dougong_xpu.twin.opening import TwinDevice

sys.path.insert(0, str(Path(__file__).parent))
for _library in ("vllm", "sgl", "ipex"):
    install(_library)


@pytest.fixture(scope="session")
def device() -> TwinDevice:
    from dougong_xpu.twin.opening import TwinDevice

    found = TwinDevice(0)
    found.setup()
    return found
