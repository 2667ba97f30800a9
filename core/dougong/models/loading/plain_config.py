"""config.json without transformers, where it leaves nothing to a default: importing its configs takes ten seconds.

Only families whose published files name every field that counts, and only files that do. All else goes through
``AutoConfig``; a test holds both ways to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

__all__ = ["plain_config"]

_SIZES = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    }
)
_NEEDED = _SIZES | {"bos_token_id", "eos_token_id", "hidden_act", "rms_norm_eps", "tie_word_embeddings"}
_FAMILIES = {"llama": _NEEDED, "qwen2": _NEEDED, "qwen3": _NEEDED | {"head_dim"}}
#: Fields that give a layer, the rope or the weights another meaning: transformers reads those.
_SPECIAL = ("auto_map", "layer_types", "partial_rotary_factor", "quantization_config", "text_config")
_ROPES = {"default", "linear", "llama3"}


def plain_config(content: Mapping[str, Any]) -> SimpleNamespace | None:
    """``content`` as transformers' config would show it, or None if that takes transformers."""
    needed = _FAMILIES.get(content.get("model_type", ""))
    if needed is None or not needed <= content.keys() or any(content.get(name) for name in _SPECIAL):
        return None
    if any(type(content[name]) is not int for name in _SIZES):
        return None
    if content.get("use_sliding_window") or (content["model_type"] == "llama" and content.get("sliding_window")):
        return None
    rope = _rope(content)
    if rope is None:
        return None
    fields = dict(content, rope_parameters=rope, sliding_window=None)
    if "dtype" not in fields and "torch_dtype" in fields:
        fields["dtype"] = fields["torch_dtype"]
    return SimpleNamespace(**fields)


def _rope(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_parameters``, also from the two fields that stood in its place before transformers 5."""
    given = content.get("rope_parameters")
    if given is None:
        if "rope_theta" not in content:
            return None
        scaling = content.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            return None
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        given = {**scaling, "rope_type": kind, "rope_theta": content["rope_theta"]}
    if not isinstance(given, Mapping) or given.get("rope_type") not in _ROPES or "rope_theta" not in given:
        return None
    return dict(given)
