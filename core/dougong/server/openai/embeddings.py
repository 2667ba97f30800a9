"""``POST /v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
import struct
import uuid
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from dougong.engine.vectors import unit
from dougong.errors import InvalidRequestError
from dougong.server.openai.completions import Prompts, as_prompts, read_prompts
from dougong.server.openai.fields import check_fields
from dougong.server.streaming import until_gone

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["EmbeddingRequest", "embed", "router"]


class EmbeddingRequest(BaseModel):
    """Texts to turn into vectors. The fields after ``user`` are not OpenAI's."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    """``float`` if left out."""
    dimensions: int | None = None
    """Only the first so many numbers, scaled to length 1 again: for models trained for it (Matryoshka)."""
    user: str | None = None

    pooling: Literal["last", "mean", "cls"] | None = None
    """In place of what the model's files say; ``last`` where they say nothing."""
    normalize: bool | None = None
    """To length 1; where the model's files say nothing, yes."""
    add_special_tokens: bool = True


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", tags=["OpenAI"])
    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        """Turn texts into vectors."""
        model = state.check_model(body.model)
        check_fields(body, state.config, {}, frozenset({"metadata", "safety_identifier"}))
        return JSONResponse(await until_gone(request, embed(state, body, model)))

    return routes


async def embed(state: ServerState, body: EmbeddingRequest, model: str) -> dict[str, Any]:
    """The answer's body.

    Raises:
        InvalidRequestError: prompts or dimensions that cannot be.
        ApiError: 429, the queue is full.
    """
    client, pooling = state.client, state.pooling
    width = client.info.hidden_size
    if body.dimensions is not None and not 1 <= body.dimensions <= width:
        raise InvalidRequestError(f"dimensions={body.dimensions}: allowed is 1 to {width}.")
    given = as_prompts(body.input, state.config.max_prompts)
    with state.queue.room(len(given)):
        prompts = await read_prompts(state, given, add_special_tokens=body.add_special_tokens)
        await client.ready(state.config.request_timeout_s)
    ids = [ids for _, ids in prompts]
    normalize = pooling.normalize if body.normalize is None else body.normalize
    name = f"embd-{uuid.uuid4().hex}"
    tasks = [
        asyncio.ensure_future(
            client.embed(
                one,
                pooling=body.pooling or pooling.kind,
                normalize=normalize,
                request_id=f"{name}-{place}",
                timeout_s=state.config.request_timeout_s,
            )
        )
        for place, one in enumerate(ids)
    ]
    try:
        vectors = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if body.dimensions is not None:
        vectors = [_shorten(vector, body.dimensions, normalize) for vector in vectors]
    count = sum(map(len, ids))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": place, "embedding": _encode(vector, body.encoding_format)}
            for place, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _shorten(vector: list[float], dimensions: int, normalize: bool) -> list[float]:
    kept = vector[:dimensions]
    return unit(kept) if normalize else kept


def _encode(vector: list[float], form: str | None) -> list[float] | str:
    """As numbers, or little-endian float32 in base64."""
    if form != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
