"""One completion that outlives the replica it runs on. Knows nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dougong.errors import EngineError
from dougong.types import SamplingParams

__all__ = ["Resumable"]


@dataclass
class Resumable:
    """What was asked, what has come so far, and how to ask the next replica for the rest.

    A token depends on the tokens before it, the request's seed and its position, so a replica that is given the prompt
    with the tokens so far goes on with the same ones. Where a token depends on which tokens were *generated* (presence
    and frequency penalties, bad words, a grammar), the next replica begins anew and what was seen is passed over.
    """

    prompt: list[int]
    params: SamplingParams
    """Of one completion, with a seed where it samples."""
    tokens: list[int] = field(default_factory=list)
    _replayed: list[int] | None = None

    @property
    def remembers(self) -> bool:
        """Whether the next token depends on what of the text was generated."""
        params = self.params
        return bool(
            params.presence_penalty
            or params.frequency_penalty
            or params.bad_words
            or params.bad_words_ids
            or params.structured is not None
            or params.extra
        )

    def next_job(self) -> dict[str, Any]:
        """prompt_token_ids and params for the next replica."""
        done = len(self.tokens)
        self._replayed = None
        if not done:
            return {"prompt_token_ids": self.prompt, "params": self.params}
        if self.remembers:
            self._replayed = []
            return {"prompt_token_ids": self.prompt, "params": self.params}
        left = None if self.params.max_tokens is None else self.params.max_tokens - done
        params = replace(
            self.params,
            max_tokens=left,
            min_tokens=max(0, self.params.min_tokens - done),
            prompt_logprobs=None,  # came with the first token
        )
        return {"prompt_token_ids": self.prompt + self.tokens, "params": params}

    @property
    def complete(self) -> bool:
        """Nothing is left to ask for."""
        return self.params.max_tokens is not None and len(self.tokens) >= self.params.max_tokens

    def take(self, tokens: list[int]) -> int:
        """Add what a replica gave; returns how many of ``tokens``, at their front, were known already.

        Raises:
            EngineError: a replica that began anew gives other tokens than were sent out already.
        """
        known = 0
        if self._replayed is not None:
            known = min(len(tokens), len(self.tokens) - len(self._replayed))
            if known > 0 and tokens[:known] != self.tokens[len(self._replayed) : len(self._replayed) + known]:
                raise EngineError(
                    "a replica died, and another one computes other tokens than were sent already (its backend rounds "
                    "differently). Ask again."
                )
            self._replayed += tokens
        self.tokens += tokens[known:]
        return known
