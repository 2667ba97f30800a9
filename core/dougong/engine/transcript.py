"""One completion's tokens as its user sees them: text, stop strings, log-probabilities, the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dougong.engine.detokenizer import Detokenizer
from dougong.engine.stop_strings import StopStrings
from dougong.types import CompletionOutput, FinishReason, Logprob, SamplingParams

__all__ = ["Transcript"]


class Transcript:
    """Fills a `CompletionOutput` token by token. It knows no scheduler: any process can keep one.

    Args:
        tokenizer: None makes no text.
        prompt_ids: the tokens before.
    """

    __slots__ = ("append", "bare", "detokenizer", "output", "sampling", "stop_strings")

    def __init__(self, sampling: SamplingParams, index: int, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.output = CompletionOutput(index)
        self.append = self.output.token_ids.append
        self.bare = False
        """Nothing hangs on the next token but its id: no text, no log-probabilities, and it is not the first."""
        wants_text = sampling.detokenize and tokenizer is not None
        self.detokenizer = Detokenizer(tokenizer, sampling.skip_special_tokens, prompt_ids) if wants_text else None
        self.stop_strings = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        if sampling.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0

    def push(self, token_id: int, finish: FinishReason | None) -> str | None:
        """Take a token; returns the stop string that it completed, if any."""
        output = self.output
        self.append(token_id)
        if self.detokenizer is None:
            self.bare = output.logprobs is None
            return None
        sampling = self.sampling
        # An end token that stopped the completion is no text, unless it was asked for.
        ended = finish is FinishReason.STOP and not sampling.include_stop_str_in_output
        text = "" if ended else self.detokenizer.push(token_id)
        found: str | None = None
        if text and self.stop_strings is not None and len(output.token_ids) > sampling.min_tokens:
            text, found = self.stop_strings.push(text)
        if text:
            output.text += text
        return found

    def finish(self, reason: FinishReason, stop_reason: int | str | None, error: str | None = None) -> None:
        """Close it; text still held back belongs to it, unless a stop string ended it."""
        if self.detokenizer is not None and not isinstance(stop_reason, str):
            rest = self.detokenizer.flush()
            if self.stop_strings is not None:
                shown, found = self.stop_strings.push(rest)
                rest = shown if found else shown + self.stop_strings.flush()
            self.output.text += rest
        self.output.stop_reason = stop_reason
        self.output.error = error
        self.output.finish_reason = reason

    def add_logprobs(self, token_id: int, entry: dict[int, Logprob]) -> None:
        """Log-probabilities of the token just pushed: its own and the likeliest ones."""
        assert self.output.logprobs is not None
        assert self.output.cumulative_logprob is not None
        self.output.logprobs.append(entry)
        self.output.cumulative_logprob += entry[token_id].logprob
