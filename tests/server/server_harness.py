"""A served model for tests: the real application over a real engine process, on a free port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from dougong import EngineConfig
from dougong.server.app import build_app
from dougong.server.config import ServerConfig
from dougong.server.keys import KeyRing
from dougong.server.limits import QueueLimit, RateLimits
from dougong.server.process.client import EngineClient
from dougong.server.run import HttpServer, uvicorn_config
from dougong.server.state import ServerState


@dataclass
class Served:
    """A running server. ``run`` runs a coroutine function on its event loop."""

    url: str
    port: int
    state: ServerState
    loop: asyncio.AbstractEventLoop

    @property
    def client(self) -> EngineClient:
        return self.state.client

    def run(self, work: Callable[[], Awaitable[Any]], timeout: float = 60) -> Any:
        async def call() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(timeout)

    def held_blocks(self) -> int:
        """KV blocks that requests hold."""
        snapshot = self.run(self.client.stats)
        return sum(state & 2 == 2 for group in snapshot.blocks for state in group.states[group.scratch_blocks :])

    def wait_idle(self, timeout: float = 30) -> None:
        """Until no request is left; the pool must then be full."""
        end = time.monotonic() + timeout
        while self.client.num_completions or self.held_blocks():
            assert time.monotonic() < end, (
                f"{self.client.num_completions} completions, {self.held_blocks()} blocks held"
            )
            time.sleep(0.02)


@contextlib.contextmanager
def served(model: Path | str, engine: dict[str, Any] | None = None, **options: Any) -> Iterator[Served]:
    """Serve ``model`` until the block is left; then every request must be over and every block free."""
    given = {"model": str(model), "backend": "cpu", "num_kv_blocks": 256, "max_num_seqs": 16} | (engine or {})
    names = {"served_model_name": ("tiny", "alias")} | options
    config = ServerConfig(engine=EngineConfig(**given), port=0, **names)
    ready: list[Served] = []
    failures: list[BaseException] = []
    up, down = threading.Event(), threading.Event()

    async def work() -> None:
        client = await EngineClient.start(config.engine)
        try:
            state = ServerState.make(config, client)
            http = HttpServer(uvicorn_config(config, build_app(state)))
            running = asyncio.ensure_future(http.serve())
            while not http.started and not running.done():
                await asyncio.sleep(0.01)
            port = http.servers[0].sockets[0].getsockname()[1]
            scheme = "https" if config.tls_cert else "http"
            ready.append(Served(f"{scheme}://127.0.0.1:{port}", port, state, asyncio.get_running_loop()))
            up.set()
            while not down.is_set():
                await asyncio.sleep(0.02)
            http.should_exit = http.force_exit = True
            await running
        finally:
            await client.close()

    def thread() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            failures.append(error)
        finally:
            up.set()

    runner = threading.Thread(target=thread, name="served")
    runner.start()
    try:
        assert up.wait(120)
        if failures:
            raise failures[0]
        yield ready[0]
        ready[0].wait_idle()
    finally:
        down.set()
        runner.join(60)
    assert not failures, failures


@contextlib.contextmanager
def listening(server: Served, *, small: bool = False, **changes: Any) -> Iterator[tuple[int, HttpServer]]:
    """Another port of the same server, with other options over the same engine: (port or 0, its HTTP server).

    Args:
        small: the kernel keeps as little of an answer as it can, so that what nobody reads stays with the server.
    """
    state = server.state
    config = replace(state.config, port=0, **changes)
    rates = RateLimits(config.rate_limit_requests, config.rate_limit_tokens)
    state = replace(state, config=config, keys=KeyRing(config.api_key, config.api_keys_file), rates=rates)

    async def start() -> tuple[HttpServer, asyncio.Future[None]]:
        http = HttpServer(uvicorn_config(state.config, build_app(state)))
        running = asyncio.ensure_future(http.serve())
        while not http.started and not running.done():
            await asyncio.sleep(0.01)
        if small:
            http.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return http, running

    http, running = server.run(start)

    async def stop() -> None:
        http.should_exit = http.force_exit = True
        await running

    try:
        yield 0 if config.uds else http.servers[0].sockets[0].getsockname()[1], http
    finally:
        server.run(stop)


def with_app(server: Served, ask: Any, **changes: Any) -> Any:
    """Run ``ask(client)`` against an application of other options over the same engine."""
    config = replace(server.state.config, **changes)
    rates = RateLimits(config.rate_limit_requests, config.rate_limit_tokens)
    state = replace(
        server.state,
        config=config,
        keys=KeyRing(config.api_key, config.api_keys_file),
        rates=rates,
        queue=QueueLimit(server.client, config.max_queue),
    )
    state.chat = type(state.chat)(config, server.client, state.queue)

    async def work() -> Any:
        server.client.observers.append(rates)
        try:
            transport = httpx.ASGITransport(build_app(state))
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await ask(client)
        finally:
            server.client.observers.remove(rates)

    return server.run(work)


def raw(port: int, data: bytes, timeout: float = 10) -> bytes:
    """Send bytes as they are and read until the server closes or stays silent."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(data)
        found = b""
        with contextlib.suppress(TimeoutError):
            while chunk := connection.recv(65536):
                found += chunk
        return found


__all__ = ["Served", "listening", "raw", "served", "with_app"]
