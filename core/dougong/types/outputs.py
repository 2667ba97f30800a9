"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dougong.types.finish import FinishReason

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "RequestTimes"]


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of a token, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's ``n`` completions. While streaming, ``text`` and ``token_ids`` grow."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for the model's own end token."""
    error: str | None = None
    """The cause, when ``finish_reason`` is ERROR."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestTimes:
    """Seconds on ``time.monotonic()``'s clock; None until it happened."""

    arrival: float | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass
class RequestOutput:
    """The state of one request, as vLLM's users know it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    embedding: list[float] | None = None
    """The prompt's vector, where ``SamplingParams.pooling`` asked for it; [hidden size]."""
    times: RequestTimes = field(default_factory=RequestTimes)
    kv_transfer_params: dict[str, Any] | None = None
    """Of an engine that gives its KV away: what to put into the prompt for the engine that takes it."""
