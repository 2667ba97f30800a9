"""From ids and numbers of the sampler to the log-probabilities that users see."""

from __future__ import annotations

from typing import Any

from dougong.execution import TokenLogprobs
from dougong.types import Logprob

__all__ = ["LogprobReader"]


class LogprobReader:
    """Adds each token's text. ``tokenizer`` None: no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def entry(self, token_id: int, found: TokenLogprobs) -> dict[int, Logprob]:
        """The token's own log-probability first, then the likeliest ones in order of rank."""
        entry = {token_id: Logprob(found.logprob, found.rank, self._text(token_id))}
        for rank, (other, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), 1):
            if other != token_id:
                entry[other] = Logprob(logprob, rank, self._text(other))
        return entry

    def _text(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id])
        return text
