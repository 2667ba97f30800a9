"""What ``torch.xpu`` has beyond torch's common calls: graphs, on the simulated device's recording."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

__all__ = ["extend"]


class XPUGraph:
    """As ``torch.xpu.XPUGraph``."""

    def __init__(self) -> None:
        self._native = torch.classes.dougong_sim.Graph()

    def capture_begin(self, pool: Any = None) -> None:
        self._native.capture_begin(graph_pool_handle() if pool is None else pool)

    def capture_end(self) -> None:
        self._native.capture_end()

    def replay(self) -> None:
        self._native.replay()


def graph_pool_handle() -> Any:
    return torch.classes.dougong_sim.GraphPool(torch.ops.dougong_sim.current_device())


def extend(module: ModuleType) -> None:
    """Add to the simulated device's module what ``torch.xpu`` has."""
    module.__dict__.update(XPUGraph=XPUGraph, graph_pool_handle=graph_pool_handle)
