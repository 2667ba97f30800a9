"""Graphs of a GPU through torch: CUDA's, HIP's and SYCL's have one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dougong.hal import Graph, GraphBackend

__all__ = ["GpuGraph", "GpuGraphs"]


class GpuGraph(Graph):
    """One recording. Kernels read their metadata from device buffers, so a replay needs no update."""

    def __init__(self, module: Any, native: Any, pool: Any, stream: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._module = module
        self._graph = native
        self._pool = pool
        self._stream = stream
        self._options = options

    @contextmanager
    def capture(self) -> Iterator[None]:
        # torch's own context manager would empty the allocator's cache and collect garbage before every capture: with
        # dozens of captures that is most of the start-up time.
        module = self._module
        self._stream.wait_stream(module.current_stream())
        with module.stream(self._stream):
            self._graph.capture_begin(pool=self._pool, **self._options)
            try:
                yield
            finally:
                self._graph.capture_end()
        module.current_stream().wait_stream(self._stream)

    def replay(self) -> None:
        self._graph.replay()


class GpuGraphs(GraphBackend):
    """Graphs of one device. They never run at the same time, so they share a pool.

    Args:
        module: torch's module of the device type (``torch.cuda``, ``torch.xpu``).
        index: which device.
        new_graph: makes torch's graph object (``torch.cuda.CUDAGraph``, ``torch.xpu.XPUGraph``).
        options: more arguments for its ``capture_begin``.
    """

    def __init__(
        self, module: Any, index: int, new_graph: Callable[[], Any], options: Mapping[str, Any] | None = None
    ) -> None:
        self._module = module
        self._index = index
        self._new_graph = new_graph
        self._options = options or {}
        self._stream: Any = None

    def new(self, pool: Any = None) -> GpuGraph:
        if self._stream is None:
            self._stream = self._module.Stream(self._index)
        return GpuGraph(self._module, self._new_graph(), pool, self._stream, self._options)

    def new_pool(self) -> Any:
        return self._module.graph_pool_handle()

    def budget(self, layers: int) -> int:
        # A graph takes about 60 kB of driver memory per launch, and a layer about ten launches.
        return 512
