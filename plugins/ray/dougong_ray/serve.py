"""The fleet behind the OpenAI-compatible server: ``dougong-ray MODEL --backends cpu,cpu``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from typing import Any

import ray
import uvicorn

from dougong.config import EngineConfig
from dougong.errors import ConfigError, DougongError
from dougong.server.app import build_app
from dougong.server.config import ServerConfig
from dougong.server.state import ServerState
from dougong_ray.client import FleetClient
from dougong_ray.config import FleetConfig
from dougong_ray.fleet import start_fleet

__all__ = ["fleet_app", "main"]


def fleet_app(server: ServerConfig, client: FleetClient) -> Any:
    """The server's ASGI application over a fleet. The live view of one engine has nothing to show and is left out."""
    if server.web:
        raise ConfigError("web=True: the page looks into one engine; a fleet has many. Give web=False.")
    return build_app(ServerState.make(server, client))  # type: ignore[arg-type]  # the same calls


def main(argv: list[str] | None = None) -> int:
    """Deploy, then serve until a signal. The fleet stays when Ray was running already (``--address``)."""
    options = _parser().parse_args(argv)
    engine: dict[str, Any] = {"model": options.model}
    for text in options.engine:
        name, _, value = text.partition("=")
        try:
            engine[name] = json.loads(value)
        except ValueError:
            engine[name] = value
    try:
        fleet = FleetConfig(
            engine=engine,
            backends=tuple(filter(None, options.backends.split(","))),
            replicas=options.replicas,
            actor_options=json.loads(options.actor_options),
        )
        server = ServerConfig(
            engine=EngineConfig(**engine), host=options.host, port=options.port, web=False,
            api_key=tuple(options.api_key),
        )  # fmt: skip
        ray.init(address=options.address, ignore_reinit_error=True, log_to_driver=False)
        asyncio.run(_serve(fleet, server))
    except DougongError as error:
        raise SystemExit(f"dougong-ray: {error}") from error
    return 0


async def _serve(fleet: FleetConfig, server: ServerConfig) -> None:
    handle = await asyncio.to_thread(start_fleet, fleet)
    client = await FleetClient.start(fleet, handle)
    with contextlib.suppress(KeyboardInterrupt):
        http = uvicorn.Config(
            fleet_app(server, client), host=server.host, port=server.port, log_level="info", lifespan="off", ws="none",
            timeout_graceful_shutdown=int(server.drain_s),
        )  # fmt: skip
        await uvicorn.Server(http).serve()
    await client.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dougong-ray", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--backends", default="", help="one backend per replica, comma-separated: cuda,cuda,cpu")
    parser.add_argument("--replicas", type=int, default=0, help="default: as many as --backends names")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=VALUE", help="an option of EngineConfig")
    parser.add_argument("--actor-options", default="{}", help='Ray\'s options of a replica, JSON: {"num_gpus": 1}')
    parser.add_argument("--address", help="a running Ray cluster; default: one is started here")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", action="append", default=[])
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
