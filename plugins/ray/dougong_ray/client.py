"""The fleet as the server's engine client: the same calls as `dougong.server.process.client.EngineClient`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from dougong.engine.logprobs import LogprobReader
from dougong.engine.prompt import PromptReader
from dougong.engine.transcript import Transcript
from dougong.engine.vectors import unit
from dougong.errors import DougongError, EngineError, InvalidRequestError
from dougong.models.tokenizer import get_tokenizer
from dougong.server.errors import EngineDownError
from dougong.server.process.observer import RequestObserver, RequestStart
from dougong.server.process.text import TextWorker
from dougong.types import FinishReason, RequestOutput, RequestTimes, SamplingParams
from dougong_ray.config import FleetConfig
from dougong_ray.resume import Resumable

__all__ = ["FleetClient"]


class FleetClient:
    """Asks the replicas, and asks another one where a replica is lost.

    ``handle`` is the deployment handle that `start_fleet` returns. Completion i of a request with n > 1 has the
    request's seed + i.
    """

    def __init__(self, config: FleetConfig, handle: Any, info: Any, tokenizer: Any) -> None:
        self.config = config
        self.info = info
        self.tokenizer = tokenizer
        self.texts = TextWorker(tokenizer)
        self.prompts = PromptReader(tokenizer, info.vocab_size, info.max_model_len)
        self.observers: list[RequestObserver] = []
        self.counters = None
        self.restarts = 0
        """Replicas that were lost under a request."""
        self._handle = handle
        self._reader = LogprobReader(tokenizer)
        self._running: dict[str, asyncio.Event] = {}
        self._closing = False
        self._lost = False

    @classmethod
    async def start(cls, config: FleetConfig, handle: Any) -> FleetClient:
        """Wait for a replica, learn from it what it serves, and load the tokenizer here."""
        info = (await handle.info.remote())["info"]
        engine = config.engine
        tokenizer = await asyncio.to_thread(
            get_tokenizer,
            engine.get("tokenizer") or info.model_path,
            revision=engine.get("revision"),
            trust_remote_code=bool(engine.get("trust_remote_code")),
            vocab_size=info.vocab_size,
        )
        return cls(config, handle, info, tokenizer)

    @property
    def healthy(self) -> bool:
        """Not closed, and the last request found a replica."""
        return not self._closing and not self._lost

    @property
    def num_completions(self) -> int:
        return len(self._running)

    def check(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        kv_transfer_params: Mapping[str, Any] | None = None,
    ) -> SamplingParams:
        """The options as the engine takes them. What a priority counts for, each replica knows.

        Raises:
            InvalidRequestError: prompt or options can never be served, or the id is in use.
        """
        if kv_transfer_params is not None:
            raise InvalidRequestError("kv_transfer_params: a fleet moves no KV between its replicas. Leave them out.")
        if request_id in self._running:
            raise InvalidRequestError(f"request id {request_id!r} is in use: give each running request its own.")
        self.prompts.read({"prompt_token_ids": prompt_token_ids})
        return self.prompts.resolve(params)

    async def ready(self, timeout_s: float | None = None) -> None:
        """Nothing to wait for: a request itself waits for a replica, within its own time limit.

        Raises:
            EngineDownError: the server shuts down.
        """
        if self._closing:
            raise EngineDownError("the server is shutting down.")

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        kv_transfer_params: Mapping[str, Any] | None = None,
        trace: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output each time it has grown; it is the same object every time. Closing it aborts.

        Raises:
            InvalidRequestError: it can never be served, or the id is in use.
        """
        resolved = self.check(
            prompt_token_ids, params, request_id=request_id, priority=priority, kv_transfer_params=kv_transfer_params
        )
        seed = resolved.seed
        if seed is None and not resolved.greedy:
            seed = random.getrandbits(62)  # the same on every replica that will be asked
        transcripts = [Transcript(resolved, index, self.tokenizer, prompt_token_ids) for index in range(resolved.n)]
        output = RequestOutput(
            request_id,
            None,
            prompt_token_ids,
            [one.output for one in transcripts],
            times=RequestTimes(arrival=time.monotonic()),
        )
        changed = self._running[request_id] = asyncio.Event()
        self._tell("started", RequestStart(request_id, len(prompt_token_ids), params, priority, trace))
        tasks = [
            asyncio.create_task(
                self._complete(
                    output,
                    transcript,
                    Resumable(
                        prompt_token_ids,
                        # Text, and what is found in it, is made here.
                        replace(resolved, n=1, stop=(), detokenize=False, seed=None if seed is None else seed + index),
                    ),
                    changed,
                    {"priority": priority, "cache_salt": cache_salt},
                )
            )
            for index, transcript in enumerate(transcripts)
        ]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not output.finished:
                try:
                    await asyncio.wait_for(changed.wait(), None if deadline is None else deadline - time.monotonic())
                except asyncio.TimeoutError:
                    for transcript in transcripts:
                        if not transcript.output.finished:
                            text = f"the request's time limit of {timeout_s:g} s is over"
                            transcript.finish(FinishReason.ABORT, None, text)
                changed.clear()
                for task in tasks:
                    if task.done() and task.exception() is not None:
                        raise task.exception()  # type: ignore[misc]
                if request_id not in self._running:
                    for transcript in transcripts:
                        if not transcript.output.finished:
                            transcript.finish(FinishReason.ABORT, None)
                output.finished = all(one.finished for one in output.outputs)
                yield output
        finally:
            for task in tasks:
                task.cancel()
            self._running.pop(request_id, None)
            self._tell("finished", output)

    async def _complete(
        self,
        output: RequestOutput,
        transcript: Transcript,
        rest: Resumable,
        changed: asyncio.Event,
        options: dict[str, Any],
    ) -> None:
        """Run one completion to its end, on as many replicas as it takes."""
        cause = ""
        try:
            for attempt in range(self.config.attempts):
                if attempt:
                    self.restarts += 1
                    await asyncio.sleep(min(0.1 * 2**attempt, 2.0))
                if rest.complete:
                    transcript.finish(FinishReason.LENGTH, None)
                    return
                name = f"{output.request_id}.{transcript.output.index}.{attempt}"
                job = {**options, **rest.next_job(), "request_id": name}
                stream = self._handle.options(stream=True).generate.remote(job)
                try:
                    async for part in stream:
                        self._lost = False
                        if transcript.output.finished:  # its time was up, or it was aborted
                            return
                        if self._take(output, transcript, rest, part):
                            return
                        changed.set()
                    cause = "its stream ended early"
                except (RayActorError, RayServeException) as error:
                    cause = f"{type(error).__name__}: {error}"
                except RayTaskError as error:
                    failure = getattr(error, "cause", None)
                    if isinstance(failure, DougongError) and not isinstance(failure, EngineError):
                        raise failure from error
                    cause = str(failure or error)
                finally:
                    stream.cancel()
            self._lost = True
            text = f"{self.config.attempts} replicas were lost under this request, the last by: {cause}"
            transcript.finish(FinishReason.ERROR, None, text)
        finally:
            changed.set()

    def _take(self, output: RequestOutput, transcript: Transcript, rest: Resumable, part: dict[str, Any]) -> bool:
        """Take what a replica sent; True when the completion is over."""
        now = time.monotonic()
        known = rest.take(part["tokens"])
        finish = None if part.get("finish") is None else FinishReason(part["finish"])
        if part.get("prompt_logprobs") is not None:
            output.prompt_logprobs = [None if one is None else self._named(one) for one in part["prompt_logprobs"]]
        output.num_cached_tokens = max(output.num_cached_tokens, part.get("cached") or 0)
        output.embedding = part.get("embedding") or output.embedding
        tokens = part["tokens"]
        for place in range(known, len(tokens)):
            output.times.last_token = now
            if output.times.first_token is None:
                output.times.first_token = now
                self._tell("first_token", output)
            last = place == len(tokens) - 1
            stop = transcript.push(tokens[place], finish if last else None)
            if "logprobs" in part and transcript.output.logprobs is not None:
                transcript.add_logprobs(tokens[place], self._named(part["logprobs"][place]))
            if stop is not None:
                transcript.finish(FinishReason.STOP, stop)
                return True
        if finish is not None:
            transcript.finish(finish, part.get("stop_reason"), part.get("error"))
        return finish is not None

    def _named(self, entry: dict[int, Any]) -> Any:
        """Log-probabilities with their tokens' texts: replicas have no tokenizer."""
        ids = list(entry)
        return self._reader.named(ids, [entry[i].logprob for i in ids], [entry[i].rank for i in ids])

    async def embed(
        self,
        prompt_token_ids: list[int],
        *,
        pooling: str = "last",
        normalize: bool = True,
        request_id: str,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> list[float]:
        """The prompt's vector, as `EngineClient.embed`."""
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, pooling=pooling)
        answer = self.generate(prompt_token_ids, params, request_id=request_id, priority=priority, timeout_s=timeout_s)
        output = [output async for output in answer][-1]
        if output.embedding is None:
            raise EngineError(output.outputs[0].error or "no replica gave a vector")
        return unit(output.embedding) if normalize else output.embedding

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets the aborted output."""
        changed = self._running.pop(request_id, None)
        if changed is not None:
            changed.set()

    async def close(self, drain_s: float = 0.0) -> None:
        """End what runs. The fleet itself stays."""
        self._closing = True
        end = time.monotonic() + drain_s
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for request_id in list(self._running):
            await self.abort(request_id)
        self.texts.close()

    def _tell(self, what: str, about: Any) -> None:
        for observer in list(self.observers):
            getattr(observer, what)(about)
