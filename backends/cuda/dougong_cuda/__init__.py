"""NVIDIA GPUs: what the core is told at start-up. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import Any

from dougong.plugins import BackendSpec, KernelSpec, hookimpl
from dougong_cuda.probe import probe

__version__ = "0.1.0"

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)


@hookimpl
def dougong_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="cuda",
            abi=CONTRACT,
            target="dougong_cuda.device:CudaDevice",
            probe=probe,
            score=100,
            description="NVIDIA GPUs (compute capability 8.0 and newer)",
        )
    ]


@hookimpl
def dougong_kernels(device: Any) -> list[KernelSpec]:
    if device.type != "cuda" or not getattr(device, "is_nvidia", False):
        return []
    from dougong_cuda.providers import kernel_specs

    return kernel_specs(device)
