"""Huawei Ascend NPUs: what the core is told at start-up. Imports neither torch nor torch_npu."""

from __future__ import annotations

from typing import Any

from dougong.plugins import BackendSpec, KernelSpec, hookimpl
from dougong_ascend.probe import probe

__version__ = "0.1.0"

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)


@hookimpl
def dougong_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="ascend",
            abi=CONTRACT,
            target="dougong_ascend.device:AscendDevice",
            probe=probe,
            score=100,
            description="Huawei Ascend NPUs (A2, A3; 310P with fewer features)",
        )
    ]


@hookimpl
def dougong_kernels(device: Any) -> list[KernelSpec]:
    if device.type != "npu":
        return []
    from dougong_ascend.providers import kernel_specs

    return kernel_specs(device)
