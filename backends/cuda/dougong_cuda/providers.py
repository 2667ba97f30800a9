"""What runs the ops on NVIDIA GPUs: the portable Triton kernels, and vendor kernels that happen to be installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.plugins import KernelSpec

if TYPE_CHECKING:
    from dougong_cuda.device import CudaDevice

__all__ = ["kernel_specs"]


def kernel_specs(device: CudaDevice) -> list[KernelSpec]:
    """Every implementation on offer for ``device``."""
    from dougong_kernels.specs import kernel_specs as portable

    return list(portable(device))
