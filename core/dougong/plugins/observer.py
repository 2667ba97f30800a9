"""What an observer of the engine's steps is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["StepObserver", "StepRecord"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step that is over. Times in seconds, on ``time.perf_counter()``'s clock."""

    index: int
    num_rows: int
    num_decode_rows: int
    num_tokens: int
    running: int
    waiting: int
    preemptions: int
    kv_usage: float
    """Share of the pool's blocks that requests hold, 0 to 1."""
    started: float
    schedule_s: float
    launch_s: float
    wait_s: float
    commit_s: float
    graph: bool = False


class StepObserver(Protocol):
    """Called on the engine's thread after each step; an exception here is logged and the observer dropped."""

    def on_step(self, record: StepRecord) -> None: ...
