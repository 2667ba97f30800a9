"""A snapshot of the scheduler, for metrics and reports."""

from __future__ import annotations

from dataclasses import dataclass

from dougong.kv import KVCacheStats

__all__ = ["SchedulerStats"]


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """Present state, and counters since the start (``total_*``)."""

    num_running: int
    num_waiting: int
    """Not running: new and preempted requests together."""
    num_preempted_waiting: int
    num_plans_in_flight: int
    total_steps: int
    total_scheduled_tokens: int
    total_preemptions: int
    total_finished: dict[str, int]
    """By finish reason."""
    kv: KVCacheStats

    @property
    def kv_usage(self) -> float:
        """Held share of the fullest KV group, 0 to 1."""
        return self.kv.usage

    @property
    def prefix_hit_rate(self) -> float:
        """Share of looked-up tokens that were found; 0 before the first look-up."""
        return self.kv.prefix_hits / self.kv.prefix_queries if self.kv.prefix_queries else 0.0
