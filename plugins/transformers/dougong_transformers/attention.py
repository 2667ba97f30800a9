"""The attention function that transformers calls in each layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from dougong.hal import AttentionSpec, LayerArgs
from dougong_transformers.dense import attend_dense
from dougong_transformers.masks import Mask, Rule
from dougong_transformers.paged import attend_paged

__all__ = ["attention_forward"]

logger = logging.get_logger(__name__)  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, Q, D], key [B, K, S, D], value [B, K, S, Dv] -> ([B, Q, H, Dv], None).

    Under continuous batching B is 1, Q all of the step's tokens, and ``cache`` transformers' paged cache.

    Raises:
        ValueError: something that the kernels do not compute; the message names what does.
    """
    _refuse(query, key, value, dropout, given)
    if given.get("output_attentions"):
        logger.warning_once("`dougong` attention does not support `output_attentions=True`. Use `eager` for it.")
    if cache is not None:
        # What a layer keeps in its ring is its window; a mask object has nothing to add to a packed batch.
        if isinstance(attention_mask, Mask) and attention_mask.rule is None:
            raise ValueError("`dougong` attention does not support custom mask functions. Try `sdpa`.")
        return attend_paged(module, cache, query, key, value, scaling, softcap, s_aux, given), None
    if not isinstance(attention_mask, Mask):
        attention_mask = _plain_mask(module, query, key, attention_mask, is_causal, sliding_window)
    rule = attention_mask.rule
    spec = layer_spec(
        query, key, value, scaling, softcap, s_aux, causal=rule is None or rule.causal, window=rule and rule.window
    )
    return attend_dense(spec, layer_args(module, s_aux), attention_mask, query, key, value), None


def layer_spec(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> AttentionSpec:
    """What the kernels must compute, read off a call's tensors [B, heads, tokens, dim]."""
    return AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        scale=float(scaling) if scaling is not None else q.shape[3] ** -0.5,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks is not None,
        dtype=q.dtype,
        kv_dtype=k.dtype,
    )


_NO_ARGS = LayerArgs()


def layer_args(module: Any, sinks: torch.Tensor | None) -> LayerArgs:
    """A layer's own values; made once per layer, since kernels know a layer by this object."""
    if sinks is None:
        return _NO_ARGS
    known: tuple[torch.Tensor, LayerArgs] | None = getattr(module, "_dougong_args", None)
    if known is None or known[0] is not sinks:
        known = sinks, LayerArgs(sinks=sinks.detach().float())
        module._dougong_args = known
    return known[1]


def _refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, given: dict[str, Any]) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("`dougong` attention has no backward pass. Use torch.no_grad(), or `sdpa` for training.")
    if dropout:
        raise ValueError(f"`dougong` attention does not support dropout ({dropout}). Call model.eval(), or use `sdpa`.")
    if given.get("position_bias") is not None:
        raise ValueError("`dougong` attention does not support `position_bias`. Try `sdpa` or `eager`.")
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ValueError(
            f"`dougong` attention takes q, k and v in one dtype, not {q.dtype}, {k.dtype} and {v.dtype}. Try `sdpa`."
        )
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "`dougong` attention inside transformers works out its plan on the host and cannot be captured. "
            "Set use_cuda_graph=False in the continuous batching config."
        )


def _plain_mask(
    module: Any, q: torch.Tensor, k: torch.Tensor, mask: Any, is_causal: bool | None, window: int | None
) -> Mask:
    """The mask of a call that brings none of ours."""
    if mask is not None:
        raise ValueError(
            f"`dougong` attention does not support a custom attention mask ({type(mask).__name__} "
            f"{list(getattr(mask, 'shape', ()))}). Give the 2D mask of padding, or try `sdpa`."
        )
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and queries not in (1, keys):
        raise ValueError(
            f"`dougong` attention was given {queries} queries, {keys} keys and no mask: it cannot know where the "
            "queries stand. Let the model make its mask, or try `sdpa`."
        )
    if causal and queries == 1:
        causal, window = (True, window) if window else (False, None)  # one query sees all that it was given
    return Mask.make(Rule(causal=causal, window=window), batch, queries, keys, keys - queries, None)
