"""Graphs of the simulated device: recorded calls that go stale unless updated.

A capture also runs its calls once, but what they computed is thrown away: until the first replay the graph's memory
holds NaN, as it would hold anything on a device that runs nothing during a capture.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dougong.errors import EngineError
from dougong.hal import Graph, GraphBackend

__all__ = ["SimGraph", "SimGraphs"]

#: Groups of calls that one process's graphs may hold, as a device has a bounded number of task handles.
MAX_GROUPS = 1024

_thread = threading.local()


class SimGraph(Graph):
    """One recording, with ``group`` and ``update`` for calls that take lengths from the host."""

    def __init__(self, owner: SimGraphs, pool: Any) -> None:
        super().__init__()
        self._owner = owner
        self._pool = pool
        self._native = torch.classes.dougong_sim.Graph()
        self.num_groups = 0

    @staticmethod
    def capturing() -> SimGraph | None:
        """The graph that this thread is capturing."""
        return getattr(_thread, "graph", None)

    @property
    def num_calls(self) -> int:
        """Kernel calls that a replay makes."""
        return int(self._native.num_calls())

    @contextmanager
    def capture(self) -> Iterator[None]:
        self._native.capture_begin(self._pool)
        _thread.graph = self
        try:
            yield
        except BaseException:
            self._native.abort()
            raise
        else:
            self._native.capture_end()
        finally:
            _thread.graph = None

    def replay(self) -> None:
        self._native.replay()

    @contextmanager
    def group(self) -> Iterator[int]:
        """Inside a capture: the calls in the ``with`` block can be recorded again under the handle it gives.

        Raises:
            EngineError: the device's graphs hold as many groups as it can.
        """
        if self._owner.num_groups >= MAX_GROUPS:
            raise EngineError(
                f"graph capture: the device's graphs already hold {MAX_GROUPS} groups, all that it can; "
                "capture fewer batch sizes (GraphBackend.budget says how many)"
            )
        handle = int(self._native.group_begin())
        self.num_groups += 1
        yield handle
        self._native.group_end()

    @contextmanager
    def update(self, handle: int) -> Iterator[None]:
        """Record the group's calls again: the same operators on whatever tensors and host values they now take."""
        self._native.update_begin(handle, True)
        try:
            yield
        except BaseException:
            self._native.abort()
            raise
        else:
            self._native.update_end()


class SimGraphs(GraphBackend):
    """The simulated device's ability to record graphs."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._graphs: weakref.WeakSet[SimGraph] = weakref.WeakSet()

    @property
    def num_groups(self) -> int:
        return sum(graph.num_groups for graph in self._graphs)

    def new_pool(self) -> Any:
        return torch.classes.dougong_sim.GraphPool(self._index)

    def new(self, pool: Any = None) -> SimGraph:
        graph = SimGraph(self, self.new_pool() if pool is None else pool)
        self._graphs.add(graph)
        return graph

    def budget(self, layers: int) -> int:
        """Each attention layer of a capture takes one group."""
        return max(1, MAX_GROUPS // max(1, layers))
