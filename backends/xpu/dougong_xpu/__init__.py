"""Intel GPUs: what the core is told at start-up. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import Any

from dougong.plugins import BackendSpec, KernelSpec, hookimpl
from dougong_xpu.probe import probe

__version__ = "0.1.0"

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)


@hookimpl
def dougong_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="xpu",
            abi=CONTRACT,
            target="dougong_xpu.device:XpuDevice",
            probe=probe,
            score=90,
            description="Intel GPUs (Arc, Data Center GPU Max and newer)",
        )
    ]


@hookimpl
def dougong_kernels(device: Any) -> list[KernelSpec]:
    if not getattr(device, "is_intel_gpu", False):
        return []
    from dougong_xpu.providers import kernel_specs

    return kernel_specs(device)
