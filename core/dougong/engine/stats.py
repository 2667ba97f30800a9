"""The engine's counters since its start."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from dougong.types import RequestOutput

__all__ = ["EngineStats"]


@dataclass
class EngineStats:
    """Sums; times in seconds of the engine's thread, by part of the step."""

    steps: int = 0
    computed_tokens: int = 0
    """Tokens that went through the model, prompts included, cached ones not."""
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Completions by finish reason."""
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    commit_s: float = 0.0

    def count(self, output: RequestOutput) -> None:
        """A request that is over."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        for completion in output.outputs:
            reason = str(completion.finish_reason)
            self.finished[reason] = self.finished.get(reason, 0) + 1

    def to_dict(self) -> dict[str, object]:
        return asdict(self)
