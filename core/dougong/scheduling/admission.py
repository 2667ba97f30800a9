"""Requests that can never be served are refused when they are added, with the reason and the way out."""

from __future__ import annotations

from dougong.errors import InvalidRequestError
from dougong.kv import KVCacheManager
from dougong.scheduling.config import SchedulerConfig
from dougong.scheduling.request import Request

__all__ = ["check_request", "most_tokens"]


def most_tokens(request: Request, config: SchedulerConfig, kv: KVCacheManager) -> int:
    """Tokens at which ``request`` ends at the latest: prompt and output together.

    The last output token is never computed, so a pool of c positions can serve c + 1 tokens.
    """
    limit = min(config.max_model_len, _capacity(config, kv) + 1)
    wanted = request.sampling.max_tokens
    return limit if wanted is None else min(limit, len(request.prompt_token_ids) + wanted)


def _capacity(config: SchedulerConfig, kv: KVCacheManager) -> int:
    return kv.capacity_tokens if config.enable_chunked_prefill else kv.one_step_capacity_tokens


def check_request(request: Request, config: SchedulerConfig, kv: KVCacheManager) -> None:
    """Refuse what can never run.

    Raises:
        InvalidRequestError: says what was asked, what fits, and which option to change.
    """
    name = f"request {request.request_id!r}"
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidRequestError(f"{name}: the prompt is empty; give at least one token.")
    try:
        request.packed(0, len(prompt))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{name}: {error}") from None
    if min(prompt) < 0:
        raise InvalidRequestError(f"{name}: token id {min(prompt)} is negative; token ids are integers >= 0.")
    if len(prompt) >= config.max_model_len:
        raise InvalidRequestError(
            f"{name}: the prompt has {len(prompt)} tokens; max_model_len={config.max_model_len} allows "
            f"{config.max_model_len - 1} and one output token. Shorten the prompt or raise max_model_len."
        )
    _check_pool(name, request, config, kv)
    for position, length, _ in request.multimodal:
        if position < 0 or length < 1 or position + length > len(prompt):
            raise InvalidRequestError(
                f"{name}: multimodal content at position {position} with {length} tokens is not inside the "
                f"prompt of {len(prompt)} tokens."
            )
    _check_family(name, request)


def _check_pool(name: str, request: Request, config: SchedulerConfig, kv: KVCacheManager) -> None:
    prompt = len(request.prompt_token_ids)
    capacity = _capacity(config, kv)
    wanted = request.sampling.max_tokens
    total = prompt + 1 if wanted is None else min(prompt + wanted, config.max_model_len)
    if total - 1 <= capacity:
        return
    asked = f"{prompt} prompt tokens" + ("" if wanted is None else f" and max_tokens={wanted}")
    need = max(g.blocks_for(total - 1) + g.pool.num_scratch_blocks for g in kv.groups)
    raise InvalidRequestError(
        f"{name}: {asked} need the KV of {total - 1} tokens; the whole pool holds {capacity}. Shorten the prompt "
        f"or lower max_tokens, or raise num_kv_blocks to at least {need}."
    )


def _check_family(name: str, request: Request) -> None:
    parent = request.parent
    if parent is None:
        return
    if parent.parent is not None:
        raise InvalidRequestError(f"{name}: its parent {parent.request_id!r} is a sibling itself; name the first one.")
    same = (
        parent.prompt_token_ids == request.prompt_token_ids
        and parent.adapter == request.adapter
        and parent.cache_salt == request.cache_salt
        and parent.multimodal == request.multimodal
    )
    if not same:
        raise InvalidRequestError(
            f"{name}: its parent {parent.request_id!r} has another prompt, adapter, salt or multimodal content, so "
            "their KV cannot be shared. Add it without a parent."
        )
