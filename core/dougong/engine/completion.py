"""One user's request while it runs: its completions, and when all of them are over."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from dougong.engine.transcript import Transcript
from dougong.scheduling import Request
from dougong.types import RequestOutput, RequestTimes, SamplingParams

__all__ = ["Completion", "RequestGroup"]


class Completion(Transcript):
    """One of a request's n completions, and the scheduler's request behind it."""

    __slots__ = ("group", "request")

    def __init__(self, group: RequestGroup, request: Request, index: int, tokenizer: Any) -> None:
        super().__init__(request.sampling, index, tokenizer, request.prompt_token_ids)
        self.group = group
        self.request = request


class RequestGroup:
    """A user's request: n completions of one prompt, and the RequestOutput that grows while they run."""

    __slots__ = ("completions", "output", "times", "unfinished", "vector")

    def __init__(self, request_id: str, prompt: str | None, prompt_ids: list[int], sampling: SamplingParams) -> None:
        self.completions: list[Completion] = []
        self.unfinished = sampling.n
        self.times = RequestTimes(arrival=time.monotonic())
        self.output = RequestOutput(request_id, prompt, prompt_ids, [], times=self.times)
        self.vector: npt.NDArray[np.float32] | None = None
        if sampling.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]

    def add(self, request: Request, tokenizer: Any) -> Completion:
        completion = Completion(self, request, len(self.completions), tokenizer)
        self.completions.append(completion)
        self.output.outputs.append(completion.output)
        return completion

    def add_vector(self, anew: bool, part: npt.NDArray[np.float32]) -> None:
        """A step's part [E] of the prompt's vector. ``anew``: the prompt begins with it (again, after a preemption)."""
        self.vector = part if anew or self.vector is None else self.vector + part

    def finish_vector(self, completion: Completion) -> None:
        """The vector is complete. The token that was sampled beside it is nobody's."""
        completion.output.token_ids.clear()
        completion.output.text = ""
        if self.vector is not None and completion.output.error is None:
            count = len(self.output.prompt_token_ids) if completion.sampling.pooling == "mean" else 1
            self.output.embedding = (self.vector / count).tolist()

    def finished_one(self) -> None:
        """One more completion is over; the request is when all are."""
        self.unfinished -= 1
        self.output.finished = self.unfinished == 0
