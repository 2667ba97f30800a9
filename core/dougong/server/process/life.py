"""The lives of the engine's process: one after the other, each started when the one before has died."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from dougong.config import EngineConfig
from dougong.errors import DougongError
from dougong.server.errors import EngineDownError
from dougong.server.process.child import EngineChild
from dougong.server.process.messages import EngineInfo, Failed, Steps

__all__ = ["EngineLives", "Listener"]

log = logging.getLogger(__name__)

#: Seconds before the first, second, … restart in a row. A life of `_STABLE_S` starts the row anew.
_BACK_OFF = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_STABLE_S = 60.0


class Listener(Protocol):
    """Who is told of what the engine says, and of its deaths. Called in the event loop."""

    def on_steps(self, steps: Steps, child: EngineChild) -> None:
        """A message of the living engine."""

    def on_death(self, cause: str, closing: bool) -> None:
        """The process is gone; ``closing``: it was asked to go. Nothing more comes from it."""

    def on_birth(self, child: EngineChild) -> None:
        """Another one stands."""


class EngineLives:
    """Keeps an engine standing: listens to the process, and starts another when it dies, with back-off.

    ``info`` and ``child`` are the present life's; ``child`` is None while there is none.
    """

    def __init__(
        self, config: EngineConfig, child: EngineChild, info: EngineInfo, listener: Listener, log_level: str
    ) -> None:
        self.info = info
        self.child: EngineChild | None = child
        self.restarts = 0
        self.closing = False
        self._config = config
        self._listener = listener
        self._log_level = log_level
        self._down: EngineDownError | None = None
        """Why there is no engine and none is being started just now."""
        self._up = asyncio.Event()
        self._up.set()
        self._task = asyncio.create_task(self._live(child), name="dougong-engine")

    @property
    def healthy(self) -> bool:
        """An engine stands, and is to go on."""
        return self.child is not None and not self.closing

    async def ready(self) -> EngineChild:
        """The process, once its engine stands.

        Raises:
            EngineDownError: it cannot be started, or is being closed.
        """
        while True:
            if self.closing:
                raise EngineDownError("the server is shutting down.")
            if self._down is not None:
                raise self._down
            if self.child is not None:
                return self.child
            await self._up.wait()

    async def close(self) -> None:
        """Let the engine end, and start no other."""
        self.closing = True
        if self.child is not None:
            await self.child.close()
        else:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self, child: EngineChild) -> None:
        failures = 0
        while True:
            born = time.monotonic()
            cause = await self._listen(child)
            self._up.clear()
            self.child = None
            self._listener.on_death(cause, self.closing)
            await child.kill()
            if self.closing:
                return
            log.error("the engine's process ended: %s; it is started again", cause)
            failures = 0 if time.monotonic() - born > _STABLE_S else failures
            found: EngineChild | None = None
            while found is None:
                await asyncio.sleep(_BACK_OFF[min(failures, len(_BACK_OFF) - 1)])
                failures += 1
                self._down = None  # who comes now waits for this start
                try:
                    found, self.info = await EngineChild.start(self._config, self._log_level)
                except Exception as error:  # whatever it is: who waits must learn of it, and another try may succeed
                    text = str(error) if isinstance(error, (DougongError, OSError)) else repr(error)
                    log.error("the engine cannot be started again: %s", text)
                    self._down = EngineDownError(f"the engine died ({cause}) and cannot be started again: {text}")
                    self._up.set()  # whoever waits learns of it
                    self._up.clear()
            child = self.child = found
            self.restarts += 1
            self._up.set()
            self._listener.on_birth(child)

    async def _listen(self, child: EngineChild) -> str:
        """Pass on what ``child`` says; returns how it ended."""
        failed: Failed | None = None
        while True:
            try:
                message = await child.steps()
            except Exception as error:  # what it says cannot be read: it is of no use any more
                log.exception("a message of the engine cannot be read")
                return f"its messages cannot be read: {error!r}"
            if message is None:
                how = await child.wait()
                return how if failed is None else f"{failed.error}: {failed.message}"
            if isinstance(message, Failed):
                failed = message
                continue
            try:
                self._listener.on_steps(message, child)
            except Exception:  # one bad message must not deafen us to the rest
                log.exception("a message of the engine could not be delivered")
            await asyncio.sleep(0)  # messages that lie ready must not keep the readers from running
