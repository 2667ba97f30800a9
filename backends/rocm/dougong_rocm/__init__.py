"""AMD GPUs: what the core is told at start-up. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import Any

from dougong.plugins import BackendSpec, KernelSpec, hookimpl
from dougong_rocm.probe import probe

__version__ = "0.1.0"

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)


@hookimpl
def dougong_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="rocm",
            abi=CONTRACT,
            target="dougong_rocm.device:RocmDevice",
            probe=probe,
            score=100,
            description="AMD GPUs (CDNA 2 and newer, RDNA 3 and newer)",
        )
    ]


@hookimpl
def dougong_kernels(device: Any) -> list[KernelSpec]:
    # torch calls AMD's devices "cuda" too.
    if not getattr(device, "is_amd", False):
        return []
    from dougong_rocm.providers import kernel_specs

    return kernel_specs(device)
