"""What the routes share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from dougong.server.config import ServerConfig
from dougong.server.errors import ApiError
from dougong.server.keys import KeyRing
from dougong.server.limits import QueueLimit, RateLimits
from dougong.server.pooling import Pooling, read_pooling
from dougong.server.process.client import EngineClient

if TYPE_CHECKING:
    from dougong.server.chat.service import ChatService
    from dougong.server.metrics import Metrics

__all__ = ["ServerState"]

#: Options of generation_config.json that are sampling's.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class ServerState:
    """One server: its options, its engine, and the services over it."""

    config: ServerConfig
    client: EngineClient
    keys: KeyRing
    rates: RateLimits
    queue: QueueLimit
    chat: ChatService
    metrics: Metrics
    pooling: Pooling
    sampling_defaults: dict[str, float | int]
    """Where a request names none."""
    created: int = field(default_factory=lambda: int(time()))

    @classmethod
    def make(cls, config: ServerConfig, client: EngineClient) -> ServerState:
        from dougong.server.chat.service import ChatService
        from dougong.server.metrics import Metrics

        rates = RateLimits(config.rate_limit_requests, config.rate_limit_tokens)
        metrics = Metrics(config.model_names[0], client.info)
        queue = QueueLimit(client, config.max_queue)
        client.observers += [rates, queue, metrics]
        return cls(
            config=config,
            client=client,
            keys=KeyRing(config.api_key, config.api_keys_file),
            rates=rates,
            queue=queue,
            chat=ChatService(config, client, queue),
            metrics=metrics,
            pooling=read_pooling(Path(client.info.model_path)),
            sampling_defaults=_defaults(Path(client.info.model_path)) if config.generation_config == "auto" else {},
        )

    def check_model(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: 404, there is no such model here.
        """
        names = self.config.model_names
        if name is None or name in names:
            return name or names[0]
        raise ApiError(
            404,
            f"the model {name!r} does not exist here. Served: {', '.join(map(repr, names))}.",
            type="invalid_request_error",
            param="model",
            code="model_not_found",
        )


def _defaults(folder: Path) -> dict[str, float | int]:
    """The model's own sampling, as its makers recommend it; nothing where it says nothing."""
    try:
        found: Any = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: found[name] for name in _SAMPLING if isinstance(found.get(name), (int, float))}
