"""``POST /tokenize`` and ``/detokenize``, in the form that vLLM's clients know."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from dougong.errors import InvalidRequestError
from dougong.server.openai.chat import ChatRequest
from dougong.server.openai.fields import check_fields

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["router"]


class TokenizeRequest(BaseModel):
    """Text (``prompt``) or a conversation (``messages``)."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1)] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, JsonValue] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", tags=["Server"])
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Token ids of a text or of a conversation."""
        state.check_model(body.model)
        check_fields(body, state.config, {}, frozenset())
        texts = state.client.texts
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages.")
        if body.prompt is not None:
            ids = await texts.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            chat = ChatRequest(
                messages=body.messages or [],
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            _, ids = await state.chat.render(chat.turn(state, f"tokenize-{uuid.uuid4().hex}"))
        found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": state.client.info.max_model_len}
        if body.return_token_strs:
            found["token_strs"] = state.client.tokenizer.convert_ids_to_tokens(ids)
        return found

    @routes.post("/detokenize", tags=["Server"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special tokens included."""
        state.check_model(body.model)
        check_fields(body, state.config, {}, frozenset())
        size = state.client.info.vocab_size
        if body.tokens and max(body.tokens) >= size:
            raise InvalidRequestError(f"tokens: {max(body.tokens)} is not in the vocabulary of {size}.")
        return {"prompt": await state.client.texts.run(lambda tokenizer: tokenizer.decode(body.tokens))}

    return routes
