"""The ROCm device: torch calls it ``cuda``, and drives HIP through ``torch.cuda``."""

from __future__ import annotations

from typing import Any

import torch

from dougong.errors import BackendNotFoundError
from dougong_kernels.gpu import GpuDevice
from dougong_kernels.graphs import GpuGraphs
from dougong_rocm.targets import COMPILED, gfx_target

__all__ = ["RocmDevice"]


class RocmDevice(GpuDevice):
    """One AMD GPU. RCCL answers to torch.distributed's name ``nccl``."""

    type = "cuda"
    dist_backend = "nccl"
    kind = "ROCm"
    visible = "HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES"
    is_amd = True

    def __init__(self, index: int = 0) -> None:
        if not torch.version.hip:
            raise BackendNotFoundError(
                f"torch {torch.__version__} is no ROCm build; install torch's ROCm build, or choose another backend"
            )
        super().__init__(index)
        target = gfx_target(self.properties.gcnArchName)
        if target is None:
            raise BackendNotFoundError(
                f"device {index} is {self.properties.gcnArchName}: the kernels are compiled for "
                f"{', '.join(COMPILED)} and their families. Choose another device with device_index or {self.visible}."
            )
        self.target = target
        # OCP's 8-bit floats are decoded by hand on gfx942, whose own are fnuz.
        self.fp8_dtype = torch.float8_e4m3fnuz if target.fp8 == "fnuz" else torch.float8_e4m3fn
        self.graphs = GpuGraphs(torch.cuda, index, torch.cuda.CUDAGraph, {"capture_error_mode": "thread_local"})

    def facts(self) -> dict[str, Any]:
        return {
            "target": f"{self.target.name} ({self.target.family})",
            "settings of": self.target.like,
            "compute units": int(self.properties.multi_processor_count),
            "wave size": int(getattr(self.properties, "warp_size", self.target.wave)),
            "8-bit floats": self.target.fp8 or "decoded in software",
            "ROCm (torch's)": torch.version.hip,
        }
