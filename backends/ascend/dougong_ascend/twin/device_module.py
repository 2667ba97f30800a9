"""What ``torch.npu`` has beyond torch's common calls: graphs with task groups, and events between them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from dougong_ascend.twin.refusal import TwinRefusal
from dougong_ascend.twin.settings import settings

__all__ = ["extend"]


class ExternalEvent:
    """An event that a captured stream waits for and something outside the graph records."""

    def __init__(self) -> None:
        self.recorded = False

    def wait(self, stream: Any) -> None:
        if NPUGraph.current is None:
            raise TwinRefusal("ExternalEvent.wait: outside a capture the stream would wait for ever")
        NPUGraph.current.events.append(self)

    def reset(self, stream: Any) -> None:
        """Captured behind the wait: after each replay the event must be recorded anew."""

    def record(self, stream: Any) -> None:
        self.recorded = True


class NPUGraph:
    """A captured graph, on the simulated device's recording."""

    current: NPUGraph | None = None

    def __init__(self) -> None:
        self._native = torch.classes.dougong_sim.Graph()
        self.events: list[ExternalEvent] = []
        self.groups = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if pool is None:
            pool = graph_pool_handle()
        self._native.capture_begin(pool)
        NPUGraph.current = self

    def capture_end(self) -> None:
        NPUGraph.current = None
        self._native.capture_end()

    def replay(self) -> None:
        late = [event for event in self.events if not event.recorded]
        if late and settings.waits:
            raise TwinRefusal(
                f"NPUGraph.replay: {len(late)} of {len(self.events)} task groups were not updated; the stream would "
                "wait for ever"
            )
        self._native.replay()
        for event in self.events:
            event.recorded = False


def graph_pool_handle() -> Any:
    return torch.classes.dougong_sim.GraphPool(torch.ops.dougong_sim.current_device())


def graph_task_group_begin(stream: Any) -> None:
    if NPUGraph.current is None:
        raise TwinRefusal("graph_task_group_begin: no capture is under way")
    NPUGraph.current.open = NPUGraph.current._native.group_begin()  # type: ignore[attr-defined]


def graph_task_group_end(stream: Any) -> tuple[NPUGraph, int]:
    graph = NPUGraph.current
    assert graph is not None
    graph._native.group_end()
    graph.groups += 1
    return graph, int(graph.open)  # type: ignore[attr-defined]


_updating: list[NPUGraph] = []


def graph_task_update_begin(stream: Any, handle: tuple[NPUGraph, int]) -> None:
    graph, group = handle
    graph._native.update_begin(group, True)
    _updating.append(graph)


def graph_task_update_end(stream: Any) -> None:
    _updating.pop()._native.update_end()


def abandon_update() -> None:
    """After a refusal inside an update: the graph keeps the group it had."""
    while _updating:
        _updating.pop()._native.abort()


def extend(npu: ModuleType) -> None:
    """Add to ``torch.npu`` what the vendor's module has."""
    npu.__dict__.update(
        NPUGraph=NPUGraph,
        ExternalEvent=ExternalEvent,
        graph_pool_handle=graph_pool_handle,
        graph_task_group_begin=graph_task_group_begin,
        graph_task_group_end=graph_task_group_end,
        graph_task_update_begin=graph_task_update_begin,
        graph_task_update_end=graph_task_update_end,
        abandon_update=abandon_update,
        get_device_name=lambda device=None: settings.soc,
    )
