"""The CUDA device: memory, streams and graphs through torch.cuda."""

from __future__ import annotations

from typing import Any

import torch

from dougong_kernels.gpu import GpuDevice
from dougong_kernels.graphs import GpuGraphs

__all__ = ["CudaDevice"]


class CudaDevice(GpuDevice):
    """One NVIDIA GPU."""

    type = "cuda"
    dist_backend = "nccl"
    kind = "CUDA"
    visible = "CUDA_VISIBLE_DEVICES"
    is_nvidia = torch.version.hip is None

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.graphs = GpuGraphs(torch.cuda, index, torch.cuda.CUDAGraph, {"capture_error_mode": "thread_local"})

    @property
    def num_processors(self) -> int:
        """Streaming multiprocessors."""
        return int(self.properties.multi_processor_count)

    def setup(self) -> None:
        super().setup()
        # Products that the library cuts along K are summed up in float32, as the reference's are.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def facts(self) -> dict[str, Any]:
        return {
            "compute capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.num_processors,
            "L2 cache (MiB)": self.properties.L2_cache_size >> 20,
            "CUDA (torch's)": torch.version.cuda,
        }
