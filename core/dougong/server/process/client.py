"""`EngineClient`: the engine as the API process knows it, through however many lives of its process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from dougong.config import EngineConfig
from dougong.engine.logprobs import LogprobReader
from dougong.engine.prompt import PromptReader
from dougong.engine.vectors import unit
from dougong.errors import ConfigError, EngineError, InvalidRequestError
from dougong.models import get_tokenizer
from dougong.server.errors import ApiError, EngineDownError
from dougong.server.process.child import EngineChild
from dougong.server.process.life import EngineLives
from dougong.server.process.messages import (
    Abort,
    Add,
    EngineInfo,
    EngineSnapshot,
    Finish,
    ResetPrefixCache,
    Snapshot,
    StepCounters,
    Steps,
    Watch,
)
from dougong.server.process.observer import RequestObserver, RequestStart
from dougong.server.process.stream import RequestStream
from dougong.server.process.text import TextWorker
from dougong.types import FinishReason, RequestOutput, SamplingParams

__all__ = ["EngineClient"]

log = logging.getLogger(__name__)

#: Seconds between two snapshots that are pushed.
_WATCH_S = 0.2


class EngineClient:
    """Requests out, growing text in. One event loop owns it; `start` makes it, `close` ends it.

    If the engine's process dies, its requests finish with an error that says how it died, and it is started again.
    Requests that come meanwhile wait for it; if it cannot start, they fail with the cause until it can.
    """

    def __init__(self, config: EngineConfig, child: EngineChild, info: EngineInfo, tokenizer: Any, log_level: str):
        self.config = config
        self.tokenizer = tokenizer
        self.texts = TextWorker(tokenizer)
        self.prompts = PromptReader(tokenizer, info.vocab_size, info.max_model_len)
        self.observers: list[RequestObserver] = []
        self.counters: StepCounters | None = None
        """Of the last step."""
        self._reader = LogprobReader(tokenizer)
        self._next_handle = 0
        self._streams: dict[int, RequestStream] = {}  # by each completion's handle
        self._by_id: dict[str, RequestStream] = {}
        self._asking: list[asyncio.Future[EngineSnapshot]] = []
        self._watchers: list[asyncio.Queue[EngineSnapshot]] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._lives = EngineLives(config, child, info, self, log_level)

    @classmethod
    async def start(cls, config: EngineConfig, *, log_level: str = "WARNING") -> EngineClient:
        """Start the engine's process and load the tokenizer beside it.

        Raises:
            DougongError: what stopped the engine's start, as it was raised there.
        """
        if config.skip_tokenizer_init:
            raise ConfigError("skip_tokenizer_init=True: a server makes text. Leave it off.")
        bare = replace(config, skip_tokenizer_init=True)
        child, info = await EngineChild.start(bare, log_level)
        try:
            tokenizer = await asyncio.to_thread(
                get_tokenizer,
                config.tokenizer or info.model_path,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                vocab_size=info.vocab_size,
            )
        except BaseException:
            await child.kill()
            raise
        return cls(bare, child, info, tokenizer, log_level)

    # -- requests ----------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Of the engine that stands, or stood last."""
        return self._lives.info

    @property
    def restarts(self) -> int:
        """How often the engine died and was started again."""
        return self._lives.restarts

    @property
    def healthy(self) -> bool:
        """An engine stands, and takes requests."""
        return self._lives.healthy and not self._closing

    @property
    def num_completions(self) -> int:
        """Completions that are not over, waiting ones included."""
        return len(self._streams)

    def check(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        kv_transfer_params: Mapping[str, Any] | None = None,
    ) -> SamplingParams:
        """The options as the engine takes them: checked against the model, bad words as ids, and no number beyond
        what the model has, since a client may send one of any size.

        Raises:
            InvalidRequestError: prompt or options can never be served, or the id is in use.
        """
        if kv_transfer_params is not None and self.config.kv_connector is None:
            raise InvalidRequestError(
                "kv_transfer_params: this server takes no KV from others. Leave them out, or start it with "
                "--kv-connector and --kv-role."
            )
        if priority and self.config.scheduling_policy == "fcfs":
            raise InvalidRequestError(
                f"priority={priority}: this engine runs requests in the order of their arrival. Leave it out, or start "
                "the server with --scheduling-policy priority."
            )
        if request_id in self._by_id:
            raise InvalidRequestError(f"request id {request_id!r} is in use: give each running request its own.")
        self.prompts.read({"prompt_token_ids": prompt_token_ids})
        capacity = self.info.capacity_tokens
        if capacity is not None and len(prompt_token_ids) > capacity:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_token_ids)} tokens; the whole KV cache holds {capacity}. Shorten it."
            )
        most, vocab = self.info.max_model_len, self.info.vocab_size
        if params.top_k > vocab or params.min_tokens > most or (params.max_tokens or 0) > most:
            params = replace(
                params,
                top_k=min(params.top_k, vocab),
                min_tokens=min(params.min_tokens, most),
                max_tokens=None if params.max_tokens is None else min(params.max_tokens, most),
            )
        return self.prompts.resolve(params)

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
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's output each time it has grown; it is the same object every time. Closing it aborts.

        A completion that failed, with the engine or alone, ends with ``finish_reason`` ERROR and its ``error``; one
        that is not over after ``timeout_s`` seconds ends with ABORT and an ``error`` that says so.

        Raises:
            InvalidRequestError: it can never be served, or the id is in use.
            EngineDownError: there is no engine, and it could not be started.
        """
        resolved = self.check(
            prompt_token_ids, params, request_id=request_id, priority=priority, kv_transfer_params=kv_transfer_params
        )
        add = Add(
            0,
            request_id,
            prompt_token_ids,
            # Text, and what is found in it, is made here.
            replace(resolved, stop=(), detokenize=False),
            priority,
            cache_salt,
            None if kv_transfer_params is None else dict(kv_transfer_params),
        )
        start = RequestStart(request_id, len(prompt_token_ids), resolved, priority, trace)
        async with aclosing(self._run(add, resolved, start, timeout_s)) as streams:
            async for stream in streams:
                yield stream.output

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
        """The prompt's vector.

        Args:
            pooling: ``last``, ``mean`` or ``cls`` (the first token) of the final hidden states.
            normalize: to length 1.

        Raises:
            InvalidRequestError, EngineDownError: as `generate`.
            EngineError: the step failed, or the engine died meanwhile.
            ApiError: 504, it took longer than ``timeout_s``.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, pooling=pooling)
        self.check(prompt_token_ids, params)
        add = Add(0, request_id, prompt_token_ids, params, priority)
        start = RequestStart(request_id, len(prompt_token_ids), params, priority)
        output: RequestOutput | None = None
        async with aclosing(self._run(add, params, start, timeout_s)) as streams:
            async for stream in streams:
                output = stream.output
        assert output is not None
        vector, end = output.embedding, output.outputs[0]
        if vector is None:
            if end.finish_reason is FinishReason.ABORT and end.error is not None:
                raise ApiError(504, end.error)
            raise EngineError(end.error or "the engine gave no vector")
        return unit(vector) if normalize else vector

    async def _run(
        self, add: Add, params: SamplingParams, start: RequestStart, timeout_s: float | None
    ) -> AsyncGenerator[RequestStream, None]:
        """Send a request and yield its stream whenever it changed, until it is over."""
        child = await self.ready()
        if add.request_id in self._by_id:
            raise InvalidRequestError(f"request id {add.request_id!r} is in use: give each running request its own.")
        add.handle = self._next_handle
        child.say(add)
        self._next_handle += params.n
        stream = RequestStream(add.handle, add.request_id, add.prompt_token_ids, params, self.tokenizer)
        self._by_id[add.request_id] = stream
        for index in range(params.n):
            self._streams[add.handle + index] = stream
        self._idle.clear()
        self._tell("started", start)
        timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            error = f"the request's time limit of {timeout_s:g} s is over"
            timer = asyncio.get_running_loop().call_later(timeout_s, self._abort, stream, error)
        try:
            finished = False
            while not finished:
                await stream.changed.wait()
                stream.changed.clear()
                if stream.refusal is not None:
                    kind, text = stream.refusal
                    raise InvalidRequestError(text) if kind == InvalidRequestError.__name__ else EngineError(text)
                finished = stream.output.finished
                yield stream
        finally:
            if timer is not None:
                timer.cancel()
            if not stream.output.finished:
                self._abort(stream)

    async def ready(self, timeout_s: float | None = None) -> EngineChild:
        """The engine's process, once it stands.

        Raises:
            EngineDownError: it cannot be started, or the server shuts down.
            ApiError: 504, it does not stand within ``timeout_s``.
        """
        if self._closing:
            raise EngineDownError("the server is shutting down.")
        try:
            return await asyncio.wait_for(self._lives.ready(), timeout_s)
        except asyncio.TimeoutError:
            text = f"the request's time limit of {timeout_s:g} s is over; the engine is being started again"
            raise ApiError(504, text) from None

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets the aborted output. Unknown ids, and those that are over, are ignored."""
        stream = self._by_id.get(request_id)
        if stream is not None:
            self._abort(stream)

    def _abort(self, stream: RequestStream, error: str | None = None) -> None:
        if self._lives.child is not None:
            self._lives.child.say(Abort(stream.handle))
        stream.end_all(FinishReason.ABORT, error)
        self._forget(stream)

    def _forget(self, stream: RequestStream) -> None:
        """A request is over: the one place where that is noted."""
        if self._by_id.pop(stream.output.request_id, None) is None:
            return
        for index in range(len(stream.transcripts)):
            self._streams.pop(stream.handle + index, None)
        if not self._by_id:
            self._idle.set()
        self._tell("finished", stream.output)

    # -- what the engine says ----------------------------------------------------------------------------

    def on_steps(self, steps: Steps, child: EngineChild) -> None:
        """Called by `EngineLives`: a message of the engine."""
        streams, now = self._streams, time.monotonic()
        for handle, token in zip(steps.handles, steps.tokens):
            stream = streams.get(handle)
            if stream is None:  # aborted meanwhile
                continue
            stream.output.times.last_token = now
            try:
                stop = stream.token(handle - stream.handle, token)
            except Exception as error:
                self._broken(stream, error, child)
                continue
            if stop is not None:
                self._stopped(stream, handle, stop, child)
        for update in steps.updates:
            stream = streams.get(update.handle)
            if stream is None:
                continue
            times = stream.output.times
            fresh = times.first_token is None
            if update.token_ids:
                times.last_token = now
            try:
                stop = stream.update(update.handle - stream.handle, update, self._reader, now)
            except Exception as error:
                self._broken(stream, error, child)
                continue
            if fresh and times.first_token is not None:
                self._tell("first_token", stream.output)
            if stop is not None:
                self._stopped(stream, update.handle, stop, child)
            elif update.finish is not None:
                streams.pop(update.handle, None)
                if stream.output.finished:
                    self._forget(stream)
        if steps.counters is not None:
            self.counters = steps.counters
            self._tell("step", steps.counters)
        if steps.snapshot is not None:
            self._show(steps.snapshot)

    def _stopped(self, stream: RequestStream, handle: int, stop: str, child: EngineChild) -> None:
        child.say(Finish(handle, stop))
        self._streams.pop(handle, None)
        if stream.output.finished:
            self._forget(stream)

    def _broken(self, stream: RequestStream, error: Exception, child: EngineChild) -> None:
        """No text could be made of what came: the request fails, and those in the same message go on."""
        log.error("request %s fails: no text could be made of its tokens", stream.output.request_id, exc_info=error)
        child.say(Abort(stream.handle))
        stream.refusal = type(error).__name__, f"no text could be made of the request's tokens: {error!r}"
        stream.changed.set()
        with contextlib.suppress(Exception):  # what it held back may be what cannot be read
            stream.end_all(FinishReason.ERROR, stream.refusal[1])
        self._forget(stream)

    def _tell(self, what: str, about: Any) -> None:
        for observer in list(self.observers):
            try:
                getattr(observer, what)(about)
            except Exception:
                log.exception("observer %r failed and is dropped", observer)
                self.observers.remove(observer)

    # -- looking in --------------------------------------------------------------------------------------

    async def stats(self) -> EngineSnapshot:
        """The engine as it stands.

        Raises:
            EngineDownError: there is no engine.
        """
        child = await self.ready()
        future: asyncio.Future[EngineSnapshot] = asyncio.get_running_loop().create_future()
        self._asking.append(future)
        child.say(Snapshot())
        return await future

    async def subscribe(self) -> AsyncGenerator[EngineSnapshot, None]:
        """Snapshots as the engine goes, at most five a second; a slow reader misses some."""
        queue: asyncio.Queue[EngineSnapshot] = asyncio.Queue(1)
        self._watchers.append(queue)
        self._watch()
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)
            self._watch()

    def _watch(self) -> None:
        if self._lives.child is not None:
            self._lives.child.say(Watch(_WATCH_S if self._watchers else 0.0))

    def _show(self, snapshot: EngineSnapshot) -> None:
        asking, self._asking = self._asking, []
        for future in asking:
            if not future.done():
                future.set_result(snapshot)
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(snapshot)

    async def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no request holds."""
        (await self.ready()).say(ResetPrefixCache())

    # -- life and death ----------------------------------------------------------------------------------

    def on_death(self, cause: str, closing: bool) -> None:
        """Called by `EngineLives`: the process is gone, and with it all its requests."""
        text = f"EngineError: the engine's process ended ({cause})"
        for stream in list(self._by_id.values()):
            stream.end_all(FinishReason.ERROR, text)
            self._forget(stream)
        for future in self._asking:
            if not future.done():
                future.set_exception(EngineDownError(text))
        self._asking = []
        if not closing:
            self._tell("engine_died", cause)

    def on_birth(self, child: EngineChild) -> None:
        """Called by `EngineLives`: another process stands."""
        self._watch()

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give those that run ``drain_s`` seconds to finish, and end the process."""
        self._closing = True
        if drain_s > 0 and not self._idle.is_set():
            try:
                await asyncio.wait_for(self._idle.wait(), drain_s)
            except asyncio.TimeoutError:
                log.warning("%d requests were not over after %.0f s and are ended", len(self._by_id), drain_s)
        for stream in list(self._by_id.values()):
            self._abort(stream)
        await self._lives.close()
        self.texts.close()
