"""The core's torch reference on the host as a backend of its own, for the suite's development and demonstrations."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dougong.hal import Device, MemoryInfo
from dougong.plugins import ABI, BackendSpec, hookimpl

__all__ = ["HostDevice", "dougong_backends"]


class HostDevice(Device):
    """The host's CPU without any kernels."""

    type = "cpu"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.torch_device = torch.device("cpu")

    def setup(self) -> None:
        pass

    def memory(self) -> MemoryInfo:
        return MemoryInfo(2**33, 2**33)

    def synchronize(self) -> None:
        pass


@hookimpl
def dougong_backends() -> Iterable[BackendSpec]:
    return [
        BackendSpec(
            name="reference",
            abi=ABI,
            target="dougong_compat.selftest.reference_backend:HostDevice",
            score=-100,
            description="the core's torch reference on the host",
        )
    ]
