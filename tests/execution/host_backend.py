"""A backend of plain torch on the host, for tests: reference kernels only."""

from __future__ import annotations

import torch

from dougong.hal import Backend, Device, MemoryInfo
from dougong.plugins import load_plugins


class HostDevice(Device):
    """The host's memory and torch's own operators."""

    type = "cpu"
    dtypes = (torch.float32, torch.bfloat16)
    free = 8 << 30

    def setup(self) -> None: ...

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.free, 16 << 30)

    def synchronize(self) -> None: ...


def host_backend() -> Backend:
    """No plugin takes part."""
    return Backend("host", "test", HostDevice(), load_plugins("", entries=()))
