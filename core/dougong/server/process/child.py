"""One life of the engine's process, seen from the API process: started, spoken to, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import tempfile
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dougong import errors
from dougong.config import EngineConfig
from dougong.errors import DougongError, EngineError, InvalidRequestError
from dougong.server.process.messages import Close, Command, Commands, Configure, EngineInfo, Failed, FromEngine, Steps

__all__ = ["EngineChild"]

log = logging.getLogger(__name__)

#: How long what a process said last may take to arrive after its end.
_LAST_WORDS_MS = 200
_DECODER = msgspec.msgpack.Decoder(FromEngine)


class EngineChild:
    """The process and the socket to it. Commands given in one turn of the event loop go out as one message."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dougong-")  # 0700: nobody else can connect
        self._context = zmq.asyncio.Context()
        self._channel = self._context.socket(zmq.PAIR)
        self._process: asyncio.subprocess.Process | None = None
        self._gone: asyncio.Task[int] | None = None
        self._receiving: asyncio.Future[bytes] | None = None
        self._silenced = False
        self._outbox: list[msgspec.Raw] = []
        self._encode = msgspec.msgpack.Encoder().encode

    @classmethod
    async def start(cls, config: EngineConfig, log_level: str = "WARNING") -> tuple[EngineChild, EngineInfo]:
        """Start a process and wait until its engine stands.

        Raises:
            DougongError: what stopped the engine's start, of the class and with the text that it had there.
        """
        child = cls()
        try:
            return child, await child._open(config, log_level)
        except BaseException:
            await child.kill()
            raise

    async def _open(self, config: EngineConfig, log_level: str) -> EngineInfo:
        address = f"ipc://{Path(self._folder.name) / 'engine'}"
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._channel.setsockopt(option, 0)
        self._channel.bind(address)
        # Standard input stays open as long as this process lives; its end tells the child to go.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dougong.server.process.worker", address, stdin=asyncio.subprocess.PIPE
        )
        self._gone = asyncio.ensure_future(self._process.wait())
        self._gone.add_done_callback(self._ended)
        await self._channel.send(self._encode(Configure(config, log_level)))
        message = await self._receive()
        if message is None:
            raise EngineError(f"the engine's process ended before it was ready: {await self.wait()}.")
        if isinstance(message, Failed):
            raise _as_raised(message)
        assert not isinstance(message, Steps)
        return message.info

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def say(self, command: Command) -> None:
        """Send soon. Never waits.

        Raises:
            InvalidRequestError: the command holds what no message can. Nothing is sent; the others go their way.
        """
        try:
            data = msgspec.Raw(self._encode(command))
        except (OverflowError, TypeError, ValueError) as error:  # an integer of more than 64 bits, half a character
            raise InvalidRequestError(f"the request cannot be handed to the engine: {error}.") from error
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)

    def _flush(self) -> None:
        items, self._outbox = self._outbox, []
        if self._channel.closed:
            return
        # Unbounded: it is the queue limit of the server that bounds what can lie here.
        self._channel.send(self._encode(Commands(items)))  # type: ignore[arg-type]  # encoded already

    async def steps(self) -> Steps | Failed | None:
        """The next message; None once the process has ended and all it said was read."""
        message = await self._receive()
        assert message is None or isinstance(message, (Steps, Failed))
        return message

    async def _receive(self) -> FromEngine | None:
        """A message, or None at the end of the process."""
        assert self._gone is not None
        if self._gone.done() and not await self._channel.poll(_LAST_WORDS_MS):
            return None
        self._receiving = asyncio.ensure_future(self._channel.recv())
        try:
            message: FromEngine = _DECODER.decode(await self._receiving)
            return message
        except asyncio.CancelledError:
            if not self._silenced:
                raise
            return None

    def _ended(self, gone: asyncio.Task[int]) -> None:
        """The process is gone: whoever waits for its next message need not wait much longer."""
        asyncio.get_running_loop().call_later(_LAST_WORDS_MS / 1000, self._silence)

    def _silence(self) -> None:
        if self._receiving is not None and not self._receiving.done():
            self._silenced = True
            self._receiving.cancel()

    async def wait(self) -> str:
        """Wait for the end of the process; says how it ended."""
        assert self._process is not None
        status = await self._process.wait()
        if status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = f"signal {-status}"
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
        return f"exit status {status}"

    async def close(self, patience_s: float = 10.0) -> None:
        """Let the engine free its device and end; kill it if it does not."""
        if self._process is not None and self._process.returncode is None:
            self.say(Close())
            try:
                await asyncio.wait_for(self._process.wait(), patience_s)
            except asyncio.TimeoutError:
                log.warning("the engine's process %s did not end within %.0f s and is killed", self.pid, patience_s)
        await self.kill()

    async def kill(self) -> None:
        """End the process at once, whatever it does, and let go of the socket."""
        process = self._process
        if process is not None:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()
        self._channel.close()
        self._context.term()
        self._folder.cleanup()


def _as_raised(failed: Failed) -> DougongError:
    """The child's exception again. One that is none of dougong's own keeps its class name in the text."""
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, DougongError):
        return kind(failed.message)
    return EngineError(f"the engine's process could not start: {failed.error}: {failed.message}")
