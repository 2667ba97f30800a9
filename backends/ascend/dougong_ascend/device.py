"""The Ascend device: memory, streams and graphs through ``torch.npu``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dougong.errors import BackendNotFoundError
from dougong.hal import Device, KVGroup, LayerCache
from dougong_ascend.graphs import AscendGraphs
from dougong_ascend.layouts import NZ
from dougong_ascend.sdk import FRACTAL_NZ

__all__ = ["AscendDevice"]


class AscendDevice(Device):
    """One NPU. Streams, events, seeding and memory are torch's defaults over ``torch.npu``."""

    type: ClassVar[str] = "npu"
    dist_backend: ClassVar[str] = "hccl"
    pins_memory: ClassVar[bool] = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        count = int(self.module.device_count())
        if index >= count:
            raise BackendNotFoundError(
                f"device_index={index} was asked for; torch_npu sees {count} NPU(s), numbered from 0. "
                "Choose another, or look at ASCEND_RT_VISIBLE_DEVICES."
            )
        self.soc = str(self.module.get_device_name(index))
        self.is_310p = "310P" in self.soc.upper()
        # The fused operators take no float32; 310P's take float16 only.
        self.dtypes = (torch.float16,) if self.is_310p else (torch.bfloat16, torch.float16)
        self.graphs = None if self.is_310p else AscendGraphs(index)

    @property
    def name(self) -> str:
        return self.soc

    def empty_cache(self, group: KVGroup, blocks: int) -> LayerCache:
        """An uninitialised cache; 310P's operators want its planes marked as tiled, which moves no data."""
        cache = super().empty_cache(group, blocks)
        if group.layout.name != NZ.name:
            return cache
        planes = {name: torch.ops.npu.npu_format_cast(plane, FRACTAL_NZ) for name, plane in cache.planes.items()}
        return LayerCache(planes, group.layout, group.kernel_block, group.spec)

    def facts(self) -> dict[str, Any]:
        import torch_npu

        return {"chip": self.soc, "torch-npu": str(torch_npu.__version__), "memory": self.memory().total}
