"""``GET /v1/models``, ``/health``, ``/version``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["router"]


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "dougong",
            "root": state.config.engine.model,
            "parent": None,
            "max_model_len": state.client.info.max_model_len,
        }

    @routes.get("/v1/models", tags=["OpenAI"])
    async def list_models() -> dict[str, Any]:
        """The model, under each of its names."""
        return {"object": "list", "data": [card(name) for name in state.config.model_names]}

    # A hub id has slashes in it.
    @routes.get("/v1/models/{model:path}", tags=["OpenAI"], responses={404: {"description": "No such model here"}})
    async def retrieve_model(model: str) -> dict[str, Any]:
        """The model of this name."""
        return card(state.check_model(model))

    @routes.get("/health", tags=["Server"], responses={503: {"description": "The engine does not run"}})
    async def health() -> JSONResponse:
        """200 while the engine runs, 503 while it does not (it is then being restarted, or the server shuts down)."""
        healthy = state.client.healthy
        body = {"status": "ok" if healthy else "engine down", "restarts": state.client.restarts}
        return JSONResponse(body, 200 if healthy else 503)

    @routes.get("/version", tags=["Server"])
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": state.client.info.version}

    return routes
