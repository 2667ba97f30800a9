"""The XPU device: memory, streams and graphs through torch's module of the device type."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dougong_kernels.gpu import GpuDevice
from dougong_kernels.graphs import GpuGraphs

__all__ = ["XpuDevice"]


class XpuDevice(GpuDevice):
    """One Intel GPU. Graphs from torch 2.11 on, where ``torch.xpu.XPUGraph`` is."""

    type: ClassVar[str] = "xpu"
    dist_backend: ClassVar[str] = "xccl"
    kind = "XPU"
    visible = "ZE_AFFINITY_MASK and ONEAPI_DEVICE_SELECTOR"
    is_intel_gpu = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        new_graph = getattr(self.module, "XPUGraph", None)
        self.graphs = None if new_graph is None else GpuGraphs(self.module, index, new_graph)

    def facts(self) -> dict[str, Any]:
        return {
            "driver": str(getattr(self.properties, "driver_version", "unknown")),
            "Xe cores": int(getattr(self.properties, "gpu_subslice_count", 0)),
            "graphs": self.graphs is not None,
            "torch": torch.__version__,
        }
