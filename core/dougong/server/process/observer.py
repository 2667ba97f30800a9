"""Who wants to know what passes through the client: metrics, tracing, logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from dougong.server.process.messages import StepCounters
from dougong.types import RequestOutput, SamplingParams

__all__ = ["RequestObserver", "RequestStart"]


@dataclass(frozen=True, slots=True)
class RequestStart:
    """A request as it was queued."""

    request_id: str
    prompt_tokens: int
    params: SamplingParams
    priority: int = 0
    trace: Mapping[str, str] | None = None


class RequestObserver(Protocol):
    """Called in the API process's event loop. Must return at once; an exception is logged and the observer dropped."""

    def started(self, request: RequestStart) -> None:
        """It goes to the engine."""
        return None

    def first_token(self, output: RequestOutput) -> None:
        """Its first token arrived; ``output.times`` says when."""
        return None

    def finished(self, output: RequestOutput) -> None:
        """It is over, for whatever reason (``output.outputs[i].finish_reason``). Called once per request."""
        return None

    def step(self, counters: StepCounters) -> None:
        """A step of the engine is over."""
        return None

    def engine_died(self, cause: str) -> None:
        """The engine's process ended unasked; its requests finish with an error, and it is started again."""
        return None
