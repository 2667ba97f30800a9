"""Graphs for host kernels: a recording of calls that a replay makes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from dougong.hal import Graph, GraphBackend

__all__ = ["HostGraph", "HostGraphs"]


class HostGraph(Graph):
    """Calls made inside ``capture`` are kept, not made."""

    current: ClassVar[HostGraph | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    @classmethod
    def launch(cls, call: Callable[[], None]) -> None:
        """Make the call, or record it."""
        if HostGraph.current is not None:
            HostGraph.current.calls.append(call)
        else:
            call()

    @contextmanager
    def capture(self) -> Iterator[None]:
        HostGraph.current = self
        try:
            yield
        finally:
            HostGraph.current = None

    def replay(self) -> None:
        for call in self.calls:
            call()


class HostGraphs(GraphBackend):
    """Graphs of the host."""

    def new(self, pool: Any = None) -> HostGraph:
        return HostGraph()
