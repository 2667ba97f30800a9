"""The engine behind asyncio: its steps run on a thread of their own, requests and outputs cross by queues."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from dougong.config import EngineConfig, engine_config_from_options
from dougong.engine.engine import Engine
from dougong.engine.prompt import Prompt
from dougong.errors import EngineError
from dougong.types import RequestOutput, SamplingParams

__all__ = ["AsyncEngine"]

log = logging.getLogger(__name__)


@dataclass
class _Stream:
    """Where one request's outputs go: a queue that belongs to the caller's event loop."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[RequestOutput | Exception]


class AsyncEngine:
    """Serve many callers at once.

    `generate` is an async iterator over a request's growing output. A caller that goes away (its task is cancelled,
    its iterator closed) aborts its request.

    Raises:
        DougongError: as `Engine`.
    """

    def __init__(self, config: EngineConfig | None = None, *, engine: Engine | None = None, **options: Any) -> None:
        if engine is None:
            engine = Engine(config if config is not None else engine_config_from_options(**options))
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._dead: Exception | None = None
        self._gate = threading.Lock()  # no command comes in once `_dead` is set
        self._thread = threading.Thread(target=self._run, name="dougong-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output each time it has grown; it is the same object every time.

        Raises:
            InvalidRequestError: it can never be served.
            EngineError: the engine stopped.
        """
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        if sampling_params is not None and sampling_params.structured is not None:
            # Away from the engine's thread, whose steps must not wait for it; `Engine.add` finds it done.
            await self.engine.grammars.ready(sampling_params.structured)

        def add() -> None:
            try:
                self.engine.add(request_id, prompt, sampling_params, priority=priority)
            except Exception as error:
                self._send(stream, [error])
            else:
                self._streams[request_id] = stream

        self._submit(add)
        finished = False
        try:
            while not finished:
                item = await stream.queue.get()
                while not stream.queue.empty():  # a slow reader sees the newest state once
                    if isinstance(item, Exception):
                        break
                    item = stream.queue.get_nowait()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._abort(request_id, stream)

    def abort(self, request_id: str) -> None:
        """End a request; its iterator gets the aborted output. Unknown ids, and those that are over, are ignored."""
        self._abort(request_id, None)

    def _abort(self, request_id: str, stream: _Stream | None) -> None:
        """``stream``: only if the id is that caller's still, and not another's that came with the same id."""

        def abort() -> None:
            if stream is not None and self._streams.get(request_id) is not stream:
                return
            output = self.engine.abort(request_id)
            if output is not None:
                self._publish([output])

        try:
            self._submit(abort)
        except EngineError:  # all requests ended when the engine did
            pass

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run ``function(engine)`` on the engine's thread, between two steps; gives back what it returns or raises.

        Raises:
            EngineError: the engine stopped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        def run() -> None:
            value, failure = None, None
            try:
                value = function(self.engine)
            except Exception as error:
                failure = error
            try:
                loop.call_soon_threadsafe(settle, value, failure)
            except RuntimeError:  # the caller's loop is closed
                pass

        self._submit(run)
        return await future

    def close(self) -> None:
        """Abort what runs, end the thread and free the device. Whoever still listens gets an EngineError."""
        self._commands.put(None)
        self._thread.join()

    def _submit(self, command: Callable[[], None]) -> None:
        with self._gate:
            if self._dead is not None:
                raise EngineError(f"the engine has stopped: {self._dead}") from self._dead
            self._commands.put(command)

    # -- the engine's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.has_work:
                    self._publish(self.engine.step())
        except Exception as error:
            log.exception("the engine's thread stopped")
            self._end(error)
        else:
            self._end(EngineError("it was closed"))

    def _obey(self) -> bool:
        """Carry out what callers asked; waits while there is no work. False: close."""
        block = not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _publish(self, outputs: list[RequestOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            by_loop.setdefault(stream.loop, []).append((stream, output))
            if output.finished:
                del self._streams[output.request_id]
        for loop, items in by_loop.items():  # one wake-up per loop and step, however many streams
            self._post(loop, items)

    @staticmethod
    def _post(loop: asyncio.AbstractEventLoop, items: list[tuple[_Stream, Any]]) -> None:
        def deliver() -> None:
            for stream, item in items:
                stream.queue.put_nowait(item)

        try:
            loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the caller's loop is closed: nobody listens any more
            pass

    def _send(self, stream: _Stream, items: list[Any]) -> None:
        self._post(stream.loop, [(stream, item) for item in items])

    def _end(self, cause: Exception) -> None:
        with self._gate:
            self._dead = cause
        while not self._commands.empty():  # what came in meanwhile must not wait for ever
            command = self._commands.get()
            if command is not None:
                command()
        reason = EngineError(f"the engine has stopped: {cause}")
        for stream in self._streams.values():
            self._send(stream, [reason])
        self._streams.clear()
        try:
            self.engine.close()
        except Exception:
            log.exception("closing the engine failed")
