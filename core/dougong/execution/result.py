"""What a step gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dougong.execution.timings import StepTimings

__all__ = ["PendingStep", "StepResult", "TokenLogprobs"]


@dataclass(slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own logits (before any sampling option).

    ``rank``: 1 is the likeliest. ``top_ids`` and ``top_logprobs`` are the likeliest tokens, best first, as many as
    the request asked for.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class StepResult:
    """By row of the plan.

    tokens           sampled ids; None where the row does not sample, or failed
    logprobs         for sampled rows whose request asked
    prompt_logprobs  for rows whose request asked: (prompt token, its logprobs) in order of position; over all steps
                     each computed position comes once, whatever the chunks and preemptions, and the prompt's first
                     token never
    vectors          for rows whose request asked for a vector: (whether this starts it anew, what this step adds, [E]
                     float32); a mean's is a sum
    errors           rows without a token: their request ends, the others go on
    complete         rows whose grammar allows nothing after this token: their request ends with it
    """

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[tuple[int, TokenLogprobs]]] = field(default_factory=dict)
    vectors: dict[int, tuple[bool, npt.NDArray[np.float32]]] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    complete: list[int] = field(default_factory=list)


class PendingStep:
    """A step that was enqueued. The device may still be at it."""

    __slots__ = ("_collect", "_result", "timings")

    def __init__(self, collect: Callable[[], StepResult], timings: StepTimings) -> None:
        self._collect: Callable[[], StepResult] | None = collect
        self._result: StepResult | None = None
        self.timings = timings

    def result(self) -> StepResult:
        """Wait for the sampled ids. Steps after this one are not waited for. May be asked again."""
        if self._collect is not None:
            self._result = self._collect()
            self._collect = None
        assert self._result is not None
        return self._result
