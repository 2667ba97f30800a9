"""NPU graphs. Host lengths are baked into a captured call, so calls that take them form a task group each.

A group is recorded again, on a side stream, before every replay. The captured stream waits for an event of that group:
a replay whose groups were not updated waits for ever rather than read stale lengths.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dougong.hal import Graph, GraphBackend

__all__ = ["AscendGraph", "AscendGraphs", "Task"]

#: Streams that captures of one device can hold, less those that the process itself needs (vllm-ascend's figure).
_CAPTURE_STREAMS = 1800

_thread = threading.local()


class Task:
    """A captured task group: its handle and the event that its update records."""

    __slots__ = ("event", "handle")

    def __init__(self, handle: Any, event: Any) -> None:
        self.handle = handle
        self.event = event


class AscendGraph(Graph):
    """One ``torch.npu.NPUGraph``."""

    def __init__(self, pool: Any, capture_stream: Any, update_stream: Any) -> None:
        super().__init__()
        self._graph = torch.npu.NPUGraph()  # type: ignore[attr-defined]
        self._pool = pool
        self._stream = capture_stream
        self._update_stream = update_stream
        self._in_flight = False

    @staticmethod
    def capturing() -> AscendGraph | None:
        """The graph that this thread is capturing."""
        return getattr(_thread, "graph", None)

    @contextmanager
    def capture(self) -> Iterator[None]:
        npu = torch.npu  # type: ignore[attr-defined]
        before = npu.current_stream()
        self._stream.wait_stream(before)
        with npu.stream(self._stream):
            pool = () if self._pool is None else (self._pool,)
            self._graph.capture_begin(*pool, capture_error_mode="thread_local")
            _thread.graph = self
            try:
                yield
            finally:
                _thread.graph = None
                self._graph.capture_end()
        before.wait_stream(self._stream)

    def group(self, launch: Callable[[], None]) -> Task:
        """Inside a capture: launch as a task group that ``update`` can record again."""
        npu = torch.npu  # type: ignore[attr-defined]
        stream = npu.current_stream()
        event = npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        npu.graph_task_group_begin(stream)
        launch()
        return Task(npu.graph_task_group_end(stream), event)

    def update(self, task: Task, launch: Callable[[], None]) -> None:
        """Record a task group again: the same operator on new host values, and let the next replay pass it."""
        npu = torch.npu  # type: ignore[attr-defined]
        if self._in_flight:  # the replay before this one may still read what the update writes
            self._update_stream.wait_stream(npu.current_stream())
            self._in_flight = False
        with npu.stream(self._update_stream):
            npu.graph_task_update_begin(self._update_stream, task.handle)
            launch()
            npu.graph_task_update_end(self._update_stream)
            task.event.record(self._update_stream)

    def replay(self) -> None:
        self._graph.replay()
        self._in_flight = True


class AscendGraphs(GraphBackend):
    """Graphs of one device. They never run at the same time, so they share a pool."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._streams: tuple[Any, Any] | None = None

    def new(self, pool: Any = None) -> AscendGraph:
        if self._streams is None:
            npu = torch.npu  # type: ignore[attr-defined]
            self._streams = npu.Stream(self._index), npu.Stream(self._index)
        return AscendGraph(pool, *self._streams)

    def new_pool(self) -> Any:
        return torch.npu.graph_pool_handle()  # type: ignore[attr-defined]

    def budget(self, layers: int) -> int:
        """Captures that fit: each layer's attention and the step itself take a stream of the device's."""
        return max(1, _CAPTURE_STREAMS // (layers + 1))
