"""From ids and numbers of the sampler to the log-probabilities that users see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dougong.types import Logprob

__all__ = ["LogprobReader", "Scores"]


class Scores(Protocol):
    """Log-probabilities at one position, as `dougong.execution.TokenLogprobs` has them."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class LogprobReader:
    """Adds each token's text. ``tokenizer`` None: no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def entry(self, token_id: int, found: Scores) -> dict[int, Logprob]:
        """The token's own log-probability first, then the likeliest ones in order of rank."""
        entry = {token_id: Logprob(found.logprob, found.rank, self._text(token_id))}
        for rank, (other, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), 1):
            if other != token_id:
                entry[other] = Logprob(logprob, rank, self._text(other))
        return entry

    def named(self, ids: Sequence[int], logprobs: Sequence[float], ranks: Sequence[int | None]) -> dict[int, Logprob]:
        """An entry that was made without texts, with them."""
        return {
            token: Logprob(logprob, rank, self._text(token))
            for token, logprob, rank in zip(ids, logprobs, ranks, strict=True)
        }

    def _text(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id])
        return text
