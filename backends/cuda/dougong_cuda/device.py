"""The CUDA device: memory, streams and graphs through torch.cuda."""

from __future__ import annotations

from typing import Any

import torch

from dougong.errors import BackendNotFoundError
from dougong.hal import Device, MemoryInfo
from dougong_cuda.graphs import CudaGraphs

__all__ = ["CudaDevice"]


class CudaDevice(Device):
    """One NVIDIA GPU."""

    type = "cuda"
    dist_backend = "nccl"
    pins_memory = True
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    is_nvidia = torch.version.hip is None

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        count = torch.cuda.device_count()
        if index >= count:
            raise BackendNotFoundError(
                f"device_index={index} was asked for; torch sees {count} CUDA device(s), numbered from 0. "
                "Choose another, or look at CUDA_VISIBLE_DEVICES."
            )
        self.properties = torch.cuda.get_device_properties(index)
        self.graphs = CudaGraphs(self)

    @property
    def name(self) -> str:
        return str(self.properties.name)

    @property
    def num_processors(self) -> int:
        """Streaming multiprocessors."""
        return int(self.properties.multi_processor_count)

    def setup(self) -> None:
        torch.cuda.set_device(self.index)
        # Decode products are short in M: cuBLASLt's heuristics choose better for them than cuBLAS'.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def memory(self) -> MemoryInfo:
        free, total = torch.cuda.mem_get_info(self.index)
        held = torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
        return MemoryInfo(free + held, total)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.index)

    def new_event(self) -> Any:
        return torch.cuda.Event()

    def facts(self) -> dict[str, Any]:
        return {
            "compute capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.num_processors,
            "L2 cache (MiB)": self.properties.L2_cache_size >> 20,
            "CUDA (torch's)": torch.version.cuda,
        }
