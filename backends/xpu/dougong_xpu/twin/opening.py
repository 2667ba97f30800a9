"""Importing this makes the process the twin, then gives the backend's own device on the simulated one."""

from __future__ import annotations

from typing import ClassVar

from dougong_xpu.twin import DEVICE_TYPE, install

install()

from dougong_xpu.device import XpuDevice  # noqa: E402 - the device type exists only from here on

__all__ = ["TwinDevice"]


class TwinDevice(XpuDevice):
    """``XpuDevice`` under the simulated device's name: torch keeps ``xpu`` for its own builds."""

    type: ClassVar[str] = DEVICE_TYPE
    dist_backend: ClassVar[str] = "gloo"
