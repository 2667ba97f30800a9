"""A plain device for the contract's own tests, so that they need no backend installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from dougong.hal import Device, MemoryInfo


class PlainDevice(Device):
    """torch's CPU with nothing of its own."""

    type = "cpu"

    def setup(self) -> None:
        pass

    def memory(self) -> MemoryInfo:
        return MemoryInfo(1 << 30, 1 << 30)


@pytest.fixture
def device() -> PlainDevice:
    return PlainDevice()


@pytest.fixture
def targets() -> Any:
    """A module whose attributes can be named in a spec's target as ``dougong_test_targets:Name``."""
    import types

    module: Any = types.ModuleType("dougong_test_targets")
    module.PlainDevice = PlainDevice
    sys.modules["dougong_test_targets"] = module
    yield module
    del sys.modules["dougong_test_targets"]
