"""``/api/embed``, and ``/api/embeddings`` as older clients ask."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from dougong.errors import InvalidRequestError
from dougong.server.ollama.models import Models
from dougong.server.openai.embeddings import EmbeddingRequest, embed
from dougong.server.openai.fields import check_fields
from dougong.server.streaming import until_gone

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["add_embed_routes"]

#: How the model is kept and run is not a request's to say.
_ACCEPTED = frozenset({"keep_alive", "options"})


class EmbedRequest(BaseModel):
    """Texts to turn into vectors."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | list[str]
    truncate: bool | None = None
    """False refuses a text that is longer than the context, in place of cutting its end off."""
    dimensions: int | None = None


class OldEmbedRequest(BaseModel):
    """One text."""

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str


def add_embed_routes(routes: APIRouter, state: ServerState, models: Models) -> None:
    missing: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such model here"}}

    async def vectors(texts: list[str], body: EmbedRequest) -> dict[str, Any]:
        """As `embed` gives them; no text, no vector."""
        if len(texts) > state.config.max_prompts:
            raise InvalidRequestError(f"input: {len(texts)} texts; at most {state.config.max_prompts} are allowed.")
        most = None if body.truncate is False else state.client.info.max_model_len - 1
        ids = [(await state.client.texts.encode(text))[:most] for text in texts]
        asked = EmbeddingRequest(input=ids, dimensions=body.dimensions)
        return await embed(state, asked, body.model)

    @routes.post("/api/embed", responses=missing)
    async def embed_texts(body: EmbedRequest, request: Request) -> Response:
        """Turn texts into vectors."""
        began = time.perf_counter_ns()
        name = models.check(body.model)
        check_fields(body, state.config, {}, _ACCEPTED)
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = await until_gone(request, vectors(texts, body)) if texts else {"data": [], "usage": {}}
        return JSONResponse(
            {
                "model": name,
                "embeddings": [one["embedding"] for one in found["data"]],
                "total_duration": time.perf_counter_ns() - began,
                "load_duration": 0,
                "prompt_eval_count": found["usage"].get("prompt_tokens", 0),
            }
        )

    @routes.post("/api/embeddings", responses=missing)
    async def embed_text(body: OldEmbedRequest, request: Request) -> Response:
        """Turn a text into a vector."""
        models.check(body.model)
        check_fields(body, state.config, {}, _ACCEPTED)
        found = await until_gone(request, vectors([body.prompt], EmbedRequest(model=body.model, input="")))
        return JSONResponse({"embedding": found["data"][0]["embedding"]})
