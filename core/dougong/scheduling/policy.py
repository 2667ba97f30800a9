"""Who goes first. A policy gives each request its rank once, when it is added; the lowest rank goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dougong.scheduling.config import SchedulerConfig
    from dougong.scheduling.request import Request

__all__ = ["POLICIES", "Policy", "Rank", "first_come_first_served", "priority_with_aging"]

#: Compared as a tuple. The second number is the order of arrival, so that ranks are unique and stable.
Rank = tuple[int, int]
#: (request, order of arrival, index of the step in which it arrived, config) -> rank.
Policy = Callable[["Request", int, int, "SchedulerConfig"], Rank]


def first_come_first_served(request: Request, order: int, step: int, config: SchedulerConfig) -> Rank:
    """The order of `Scheduler.add`. Nobody is ever overtaken by a later arrival."""
    return (0, order)


def priority_with_aging(request: Request, order: int, step: int, config: SchedulerConfig) -> Rank:
    """Lower ``priority`` first; one level counts as much as ``priority_aging_steps`` steps of waiting.

    Waiting makes all requests older at the same rate, so the order between two of them never changes and
    can be fixed at arrival: arrival step + priority * aging. A request of priority p is overtaken by one of
    priority q < p only if that arrives within (p - q) * aging steps after it: nobody starves.
    """
    if config.priority_aging_steps is None:
        return (request.priority, order)
    return (step + request.priority * config.priority_aging_steps, order)


POLICIES: dict[str, Policy] = {"fcfs": first_come_first_served, "priority": priority_with_aging}
