"""What this backend does not do inside SGLang, said before anything is computed."""

from __future__ import annotations

from typing import Any

__all__ = ["refuse_call", "refuse_layer", "refuse_runner"]

#: The pool whose buffers are [places, heads, dim] and whose places are the ones in the table of requests.
_POOL = "MHATokenToKVPool"


def refuse_runner(runner: Any) -> None:
    """Judge a model runner and its options.

    Raises:
        ValueError: one of them needs what this backend has not; names it and what to do.
    """
    args, model = runner.server_args, runner.model_config
    pool = type(runner.token_to_kv_pool).__name__
    layout = getattr(runner.token_to_kv_pool, "kv_cache_layout", "nhd")
    allocator = getattr(runner, "token_to_kv_pool_allocator", None)
    wrong = [
        (getattr(runner, "use_mla_backend", False), "MLA models"),
        (getattr(model, "is_encoder_decoder", False), "encoder-decoder models"),
        (getattr(args, "speculative_algorithm", None), "speculative decoding"),
        (getattr(args, "kv_cache_dtype", "auto") not in ("auto", None), f"--kv-cache-dtype {args.kv_cache_dtype}"),
        (getattr(args, "dcp_size", 1) > 1, "decode context parallelism"),
        # A rank's queries are then a part of the batch's, in a place of their own.
        (getattr(args, "attn_cp_size", 1) > 1 or getattr(args, "enable_prefill_cp", False), "context parallel prompts"),
        (getattr(args, "enable_deterministic_inference", False), "--enable-deterministic-inference"),
        (pool != _POOL, f"KV pools of the kind {pool}"),
        (layout != "nhd", f"KV pools that lie as {layout}"),
        # The table of requests then holds names of places, not places.
        (getattr(allocator, "translate_kv_loc", None) is not None, "the unified memory pool"),
    ]
    found = [what for bad, what in wrong if bad]
    if found:
        raise ValueError(
            f"--attention-backend dougong does not support {', '.join(found)}. Choose another attention backend "
            "(triton, fa3, flashinfer), or leave that option out."
        )


def refuse_layer(layer: Any) -> None:
    """Judge a layer, once.

    Raises:
        ValueError: it asks for something that would be left out.
    """
    odd = []
    attn_type = getattr(layer.attn_type, "value", layer.attn_type)
    if layer.is_cross_attention:
        odd.append("cross attention")
    if attn_type != "decoder":
        odd.append(f"attention type {attn_type}")
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        odd.append(f"logit capping by {layer.logit_capping_method}")
    if layer.xai_temperature_len > 0:
        odd.append("temperature by length")
    if layer.k_scale is not None or layer.v_scale is not None:
        odd.append("cache scales")
    _refuse(layer, odd)


def refuse_call(layer: Any, given: dict[str, Any]) -> None:
    """Judge what a model hands to attention beside q, k and v.

    Raises:
        ValueError: it would be left out.
    """
    _refuse(layer, sorted(name for name, value in given.items() if value is not None))


def _refuse(layer: Any, odd: list[str]) -> None:
    if odd:
        raise ValueError(
            f"--attention-backend dougong does not support {', '.join(odd)} (layer {layer.layer_id}). Choose another "
            "attention backend."
        )
