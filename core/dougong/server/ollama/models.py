"""The model as Ollama's API describes models: tags, ps, show, version."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from dougong import __version__

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["Models"]

_LATEST = ":latest"


class ShowRequest(BaseModel):
    """Which model to describe. ``name`` is what older clients call it."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class Models:
    """The served model under each of its names. ``name:latest`` means ``name``."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def check(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: 404, there is no such model here.
        """
        if name is not None and name.endswith(_LATEST) and name not in self._state.config.model_names:
            self._state.check_model(name[: -len(_LATEST)])
            return name
        return self._state.check_model(name)

    def add_routes(self, routes: APIRouter) -> None:
        @routes.get("/api/tags")
        async def tags() -> dict[str, Any]:
            """The model, under each of its names."""
            return {"models": [self._card(name) for name in self._state.config.model_names]}

        @routes.get("/api/ps")
        async def running() -> dict[str, Any]:
            """The model, which stays loaded."""
            forever = "2318-01-01T00:00:00Z"
            cards = [self._card(name) for name in self._state.config.model_names]
            return {"models": [card | {"expires_at": forever, "size_vram": 0} for card in cards]}

        @routes.get("/api/version")
        async def version() -> dict[str, str]:
            """The server's version."""
            return {"version": __version__}

        @routes.post("/api/show", responses={404: {"description": "There is no such model here"}})
        async def show(body: ShowRequest) -> dict[str, Any]:
            """What the model is."""
            self.check(body.model or body.name)
            return self._described()

    def _details(self) -> dict[str, Any]:
        config = self._state.config.engine
        family = _family(self._state)
        return {
            "parent_model": "",
            "format": "gguf" if str(config.model).endswith(".gguf") else "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": config.quantization or config.dtype,
        }

    def _card(self, name: str) -> dict[str, Any]:
        modified, size = _files(Path(self._state.client.info.model_path))
        return {
            "name": name,
            "model": name,
            "modified_at": modified,
            "size": size,
            "digest": hashlib.sha256(self._state.client.info.model_path.encode()).hexdigest(),
            "details": self._details(),
        }

    def _described(self) -> dict[str, Any]:
        state = self._state
        capabilities = ["completion"]
        dialect = state.chat.dialect
        if dialect.tools is not None:
            capabilities.append("tools")
        if dialect.reasoning is not None:
            capabilities.append("thinking")
        family = _family(state)
        template = getattr(state.client.tokenizer, "chat_template", None)
        return {
            "license": "",
            "modelfile": f"FROM {state.config.engine.model}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in state.sampling_defaults.items()),
            "template": template if isinstance(template, str) else "",
            "details": self._details(),
            "model_info": {
                "general.architecture": family,
                "general.basename": state.config.model_names[0],
                f"{family}.context_length": state.client.info.max_model_len,
                f"{family}.vocab_size": state.client.info.vocab_size,
            },
            "capabilities": capabilities,
            "modified_at": _files(Path(state.client.info.model_path))[0],
        }


def _family(state: ServerState) -> str:
    """The model's architecture as its config names it."""
    try:
        config = json.loads((Path(state.client.info.model_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unknown"
    return str(config.get("model_type", "unknown")) if isinstance(config, dict) else "unknown"


def _files(path: Path) -> tuple[str, int]:
    """(when the newest of the model's files was written, bytes of all)."""
    files = [path] if path.is_file() else [one for one in path.glob("*") if one.is_file()]
    stats = [one.stat() for one in files]
    newest = max((one.st_mtime for one in stats), default=0.0)
    return datetime.fromtimestamp(newest, timezone.utc).isoformat().replace("+00:00", "Z"), sum(
        s.st_size for s in stats
    )
