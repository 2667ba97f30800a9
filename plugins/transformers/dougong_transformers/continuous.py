"""Continuous batching: transformers keeps a closed list of implementations there, and this puts ours on it.

Three of its functions decide by name: whether the manager takes the implementation, whether batches of decodes get a
block table, and how much memory attention needs beside the cache. Each is wrapped, and asked as before for every
other implementation.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from dougong_transformers.versions import NAME, TRIED

__all__ = ["admit"]

#: What the cache asks to know whether an implementation takes masks, and repeats heads, in memory.
_NEEDS_NO_MASK = "is_flash_attention_requested"


def admit() -> None:
    """Let the manager take our implementation. Where its inside looks different, transformers goes on to refuse it."""
    try:
        from transformers.generation.continuous_batching import cache, continuous_api, initialization

        manager = continuous_api.ContinuousBatchingManager
        _expect(manager.switch_to_cb_friendly_attn, "model")
        _expect(initialization.ensure_decode_fast_path_is_available, "config", "cb_config")
        _expect(getattr(cache, _NEEDS_NO_MASK), "config")
        _expect(cache.PagedAttentionCache.update, "key_states", "value_states", "layer_idx", "kwargs")
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(
            f"dougong_transformers: continuous batching of this transformers looks different ({error}); it was tried "
            f"with {', '.join(TRIED)}. `generate` works, `generate_batch` will refuse attn_implementation='{NAME}'.",
            stacklevel=4,
        )
        return
    _wrap(manager, "switch_to_cb_friendly_attn", _keep_ours)
    _wrap(initialization, "ensure_decode_fast_path_is_available", _block_tables)
    _wrap(cache, _NEEDS_NO_MASK, _needs_no_mask)


def _keep_ours(original: Callable[..., Any], self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    return None if model.config._attn_implementation == NAME else original(self, model, *args, **kwargs)


def _block_tables(original: Callable[..., Any], config: Any, cb_config: Any, *args: Any, **kwargs: Any) -> Any:
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR, group_layers_by_attn_type

    if config._attn_implementation != NAME:
        return original(config, cb_config, *args, **kwargs)
    if not all(ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in group_layers_by_attn_type(config)):
        cb_config.max_blocks_per_request = 0
    return None


def _needs_no_mask(original: Callable[..., Any], config: Any = None, *args: Any, **kwargs: Any) -> Any:
    return getattr(config, "_attn_implementation", None) == NAME or original(config, *args, **kwargs)


def _expect(function: Callable[..., Any], *names: str) -> None:
    known = inspect.signature(function).parameters
    missing = [name for name in names if name not in known]
    if missing:
        raise TypeError(f"{function.__qualname__} takes no {', '.join(missing)}")


def _wrap(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "_dougong", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    wrapper._dougong = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)
