"""One request in the API process: its text as it grows, and who waits for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from dougong.engine.logprobs import LogprobReader
from dougong.engine.transcript import Transcript
from dougong.server.process.messages import TokenScores, Update
from dougong.types import FinishReason, Logprob, RequestOutput, RequestTimes, SamplingParams

__all__ = ["RequestStream"]


class RequestStream:
    """The n completions of a request. Everything here costs O(1) per token.

    ``changed`` is set when the output has grown, however often since it was last looked at: a slow reader sees the
    newest state once.
    """

    __slots__ = ("changed", "handle", "output", "refusal", "transcripts", "unfinished")

    def __init__(
        self, handle: int, request_id: str, prompt_ids: list[int], params: SamplingParams, tokenizer: Any
    ) -> None:
        self.handle = handle
        self.transcripts = [Transcript(params, index, tokenizer, prompt_ids) for index in range(params.n)]
        self.output = RequestOutput(
            request_id,
            None,
            prompt_ids,
            [transcript.output for transcript in self.transcripts],
            times=RequestTimes(arrival=time.monotonic()),
        )
        self.unfinished = params.n
        self.changed = asyncio.Event()
        self.refusal: tuple[str, str] | None = None
        """(class name, text) of the error with which the engine refused the request."""

    def token(self, index: int, token_id: int) -> str | None:
        """Completion ``index`` got a plain token; returns the stop string that it completed."""
        stop = self.transcripts[index].push(token_id, None)
        if stop is not None:
            self._end(index, FinishReason.STOP, stop)
        self.changed.set()
        return stop

    def update(self, index: int, update: Update, reader: LogprobReader, now: float) -> str | None:
        """Completion ``index`` changed in other ways too; returns the stop string that one of the tokens completed."""
        transcript, output = self.transcripts[index], self.output
        times = output.times
        if update.scheduled_at is not None and times.first_scheduled is None:
            times.first_scheduled = update.scheduled_at
        if update.prompt_scores is not None:
            output.prompt_logprobs = [None if one is None else _entry(reader, one) for one in update.prompt_scores]
        if update.token_ids:
            times.first_token = now if times.first_token is None else times.first_token
        if update.vector is not None:
            output.embedding = update.vector
        output.num_cached_tokens = max(output.num_cached_tokens, update.cached_tokens)
        if update.kv_transfer_params is not None:
            output.kv_transfer_params = update.kv_transfer_params
        finish = None if update.finish is None else FinishReason(update.finish)
        last = len(update.token_ids) - 1
        for place, token_id in enumerate(update.token_ids):
            stop = transcript.push(token_id, finish if place == last and not update.last_is_text else None)
            if update.scores is not None:
                transcript.add_logprobs(token_id, _entry(reader, update.scores[place]))
            if stop is not None:
                self._end(index, FinishReason.STOP, stop)
                self.changed.set()
                return stop if finish is None else None
        if finish is not None:
            if update.error_type is not None and not transcript.output.token_ids:
                self.refusal = update.error_type, update.error or ""
                self.end_all(FinishReason.ERROR, update.error)
            else:
                self._end(index, finish, update.stop_token, update.error)
        self.changed.set()
        return None

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """Whatever is not over ends now."""
        for index, transcript in enumerate(self.transcripts):
            if not transcript.output.finished:
                self._end(index, reason, None, error)
        self.changed.set()

    def _end(self, index: int, reason: FinishReason, stop: int | str | None, error: str | None = None) -> None:
        self.transcripts[index].finish(reason, stop, error)
        self.unfinished -= 1
        self.output.finished = self.unfinished == 0


def _entry(reader: LogprobReader, scores: TokenScores) -> dict[int, Logprob]:
    return reader.named(scores.ids, scores.logprobs, scores.ranks)
