"""Device graphs: a step's launches recorded once and replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["Graph", "GraphBackend"]


class Graph(ABC):
    """One recording. ``state`` is where a vendor's kernels keep handles for ``update_graph``, keyed as they like."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}

    @abstractmethod
    def capture(self) -> AbstractContextManager[None]:
        """Record what is launched inside the ``with`` block. Host reads and synchronisation inside are errors."""

    @abstractmethod
    def replay(self) -> None:
        """Launch the recording on the current stream; tensors keep the addresses they had at capture."""


class GraphBackend(ABC):
    """A device's ability to record graphs."""

    @abstractmethod
    def new(self, pool: Any = None) -> Graph:
        """An empty graph that shares the memory pool ``pool`` (from ``new_pool``)."""

    def new_pool(self) -> Any:
        """A memory pool for graphs that never run at the same time; None where the device has no such thing."""
        return None

    def budget(self, layers: int) -> int:
        """How many captures of a model of ``layers`` layers the device can hold."""
        return 64
