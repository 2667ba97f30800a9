"""The scheduler's options."""

from __future__ import annotations

from dataclasses import dataclass

from dougong.errors import ConfigError
from dougong.scheduling.policy import POLICIES

__all__ = ["SchedulerConfig"]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one scheduler. Frozen; checked when made.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    max_num_seqs: int = 256
    """Most requests that run at once: rows of the persistent batch."""
    max_num_batched_tokens: int = 8192
    """Most tokens computed in one step, decodes and prefill chunks together."""
    max_model_len: int = 4096
    """Most tokens of one request, prompt and output together."""
    enable_chunked_prefill: bool = True
    """False: a prompt is computed in one step, and waits until it fits into one."""
    policy: str = "fcfs"
    """Name in `POLICIES`: ``fcfs`` or ``priority``."""
    priority_aging_steps: int | None = 1000
    """With ``priority``: one level weighs as much as this many steps of waiting. None: a strict order, in
    which requests of a low priority can wait for ever."""
    long_prefill_threshold: int | None = None
    """Most tokens that one request prefills in one step, so that a long prompt leaves budget to others."""
    watermark: float = 0.01
    """Share of the blocks kept free when a request is admitted beside others, so that those already running
    can grow before anybody must be preempted."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "long_prefill_threshold"):
            value = getattr(self, name)
            if value is None and name == "long_prefill_threshold":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: allowed is an integer >= 1.")
        if self.max_model_len < 2:
            raise ConfigError("max_model_len=1 leaves no room for a prompt token and an output token: give 2 or more.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every running request decodes one token per step. Raise "
                "max_num_batched_tokens or lower max_num_seqs."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"enable_chunked_prefill=False with max_num_batched_tokens={self.max_num_batched_tokens} and "
                f"max_model_len={self.max_model_len}: a prompt would not fit into a step. Raise "
                "max_num_batched_tokens to max_model_len, or allow chunks."
            )
        if not self.enable_chunked_prefill and self.long_prefill_threshold is not None:
            raise ConfigError(
                f"long_prefill_threshold={self.long_prefill_threshold} cuts prompts into chunks, "
                "enable_chunked_prefill=False forbids that: drop one of them."
            )
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r}: known are {', '.join(sorted(POLICIES))}.")
        if self.priority_aging_steps is not None and self.priority_aging_steps < 1:
            raise ConfigError(
                f"priority_aging_steps={self.priority_aging_steps}: allowed is an integer >= 1, or None for a "
                "strict order."
            )
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark={self.watermark}: allowed is a share from 0 up to but not including 1.")
