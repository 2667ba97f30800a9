"""CUDA graphs through torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dougong.hal import Graph, GraphBackend

if TYPE_CHECKING:
    from dougong_cuda.device import CudaDevice

__all__ = ["CudaGraph", "CudaGraphs"]


class CudaGraph(Graph):
    """One CUDA graph. Kernels read their metadata from device buffers, so a replay needs no update."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool
        self._stream = stream

    @contextmanager
    def capture(self) -> Iterator[None]:
        # torch.cuda.graph would empty the allocator's cache and collect garbage before every capture: with dozens
        # of captures that is most of the start-up time.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs(GraphBackend):
    """Graphs of one device. They never run at the same time, so they share a pool."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def new(self, pool: Any = None) -> CudaGraph:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device.index)
        return CudaGraph(pool, self._stream)

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def budget(self, layers: int) -> int:
        # A graph takes about 60 kB of driver memory per launch, and a layer about ten launches.
        return 512
