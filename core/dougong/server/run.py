"""Running a server: engine, HTTP, signals, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.config
import os
import signal
import ssl
import sys
from typing import Any

import uvicorn

from dougong.server.app import build_app
from dougong.server.config import ServerConfig
from dougong.server.connection import PatientProtocol, patient
from dougong.server.logs import RequestLog, log_config
from dougong.server.process.client import EngineClient
from dougong.server.state import ServerState

__all__ = ["HttpServer", "serve", "uvicorn_config"]

log = logging.getLogger("dougong.server")


#: Looks at the connections in so many ticks (of 0.1 s) of uvicorn's.
_TICKS = 5


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers (what a signal means is decided in `serve`), and with an end to answers
    that nobody takes."""

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, PatientProtocol):
                    connection.check_reader(now)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def serve(config: ServerConfig) -> None:
    """Serve until a signal: SIGTERM or SIGINT drains, a second one ends at once.

    Raises:
        DougongError: what stops the start.
    """
    logging.config.dictConfig(log_config(config.log_format, config.log_level))  # type: ignore[arg-type]  # checked
    if not config.engine.trust_remote_code:  # a tokenizer's own code may need it
        _do_without_torch()
    asyncio.run(_serve(config))


def _do_without_torch() -> None:
    """Keep torch out of this process, which makes and reads text: seconds at the start, hundreds of megabytes.

    transformers imports it for its configs wherever it is installed. A None in ``sys.modules`` is Python's own way of
    saying that a module is not to be had; the engine's process is none of its concern.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # typeshed knows modules only
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it was not found


async def _serve(config: ServerConfig) -> None:
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    log.info("loading %s", config.engine.model)
    starting = asyncio.ensure_future(EngineClient.start(config.engine, log_level=config.log_level.upper()))
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return
    stopped.cancel()
    client = starting.result()
    tracing: Any = None
    try:
        state = ServerState.make(config, client)
        if config.log_requests:
            client.observers.append(RequestLog(config.log_prompts))
        if config.otlp_traces_endpoint is not None:
            from dougong.server.tracing import Tracing

            tracing = Tracing(config.otlp_traces_endpoint, config.model_names[0])
            client.observers.append(tracing)
        http = HttpServer(uvicorn_config(config, build_app(state)))
        running = asyncio.ensure_future(http.serve())
        await _announce(http, running, config, client)
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await _drain(http, running, client, config.drain_s, hurry)
        else:
            stopped.cancel()
            await running
    finally:
        await client.close()
        if tracing is not None:
            tracing.close()


async def _drain(
    http: uvicorn.Server, running: asyncio.Future[None], client: EngineClient, drain_s: float, hurry: asyncio.Event
) -> None:
    """Take no connection any more, let what runs finish for ``drain_s`` seconds or until a second signal."""
    log.info("shutting down: %d completions may finish within %.0f s", client.num_completions, drain_s)
    http.should_exit = True  # closes the listening sockets, then waits for open answers
    hurried = asyncio.ensure_future(hurry.wait())
    await asyncio.wait((running, hurried), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        log.warning("ending %d completions that were not over", client.num_completions)
        await client.close()  # their answers end with an error
        await asyncio.wait((running,), timeout=2.0)
        http.force_exit = True
    hurried.cancel()
    await asyncio.wait((running,), timeout=5.0)


async def _announce(
    http: uvicorn.Server, running: asyncio.Future[None], config: ServerConfig, client: EngineClient
) -> None:
    while not http.started and not running.done():
        await asyncio.sleep(0.01)
    if running.done():
        return
    info = client.info
    where = config.uds or f"{'https' if config.tls_cert else 'http'}://{_host(config.host)}:{_port(http)}"
    log.info(
        "serving %s on %s: %s, %s, %d KV blocks, context %d; ready after %.1f s",
        ", ".join(config.model_names), where, info.backend, info.dtype, info.usable_blocks, info.max_model_len,
        info.start_s,
    )  # fmt: skip
    if not config.wants_keys and config.uds is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("anybody who reaches %s may use this server: give --api-key or --api-keys-file", config.host)


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(http: uvicorn.Server) -> int:
    """The port that was taken, where 0 was asked for."""
    for server in http.servers:
        for socket in server.sockets:
            name = socket.getsockname()
            if isinstance(name, tuple):
                return int(name[1])
    return http.config.port


def uvicorn_config(config: ServerConfig, app: Any) -> uvicorn.Config:
    """The options of ``app``'s HTTP server."""
    return uvicorn.Config(
        app,
        http=patient(config.head_timeout_s, config.write_timeout_s),
        host=config.host,
        port=config.port,
        uds=config.uds,
        log_config=None,
        log_level=config.log_level,
        access_log=config.access_log,
        timeout_keep_alive=config.keep_alive_s,
        backlog=4096,
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        ssl_ca_certs=config.tls_client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE,
        server_header=False,
        lifespan="off",
        ws="none",
    )
