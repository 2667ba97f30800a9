"""Which models of transformers' own code can run over a paged cache, and why the others cannot."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dougong.errors import UnsupportedModelError

__all__ = ["DECODERS_EMBED", "KNOWN_LAYERS", "refuse_class", "refuse_config", "refuse_modules"]

DECODERS_EMBED = (
    "Decoders are served, for embeddings too: take an embedding model made of one, such as Qwen3-Embedding or "
    "e5-mistral."
)
KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
_RECURRENT = re.compile(
    r"(^|_)(mamba\d?|ssm|rwkv|recurrent|rg_?lru|delta_?net|linear_attention|lightning|retention|[xms]?_?lstm|hyena|"
    r"state_space|conv)($|_)"
)
#: Config fields that only models with recurrent layers have.
_RECURRENT_FIELDS = (
    "mamba_d_state",
    "mamba_n_heads",
    "ssm_cfg",
    "state_size",
    "linear_num_value_heads",
    "time_mix_extra_dim",
)


def _is_recurrent(name: str) -> bool:
    """Judge a name, ``snake_case`` or ``CamelCase``, by its words."""
    return bool(_RECURRENT.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))


def refuse_config(config: Any, architecture: str) -> None:
    """Judge by the config alone.

    Raises:
        UnsupportedModelError: it is an encoder, or has layers that are no attention over past tokens.
    """
    # A family that can be either, and here is no decoder (GPT-NeoX's configs have the first of the two, unused).
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        raise UnsupportedModelError(
            f"{architecture} (model type {config.model_type!r}) is an encoder: its tokens see those that follow them, "
            f"which has no place in a paged cache. {DECODERS_EMBED}"
        )
    kinds = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])
    known = KNOWN_LAYERS | {"attention", "hybrid"}
    odd = sorted({kind for kind in kinds if kind not in known or _is_recurrent(kind) or kind == "hybrid"})
    recurrent = [kind for kind in odd if _is_recurrent(kind) or kind == "hybrid"]
    fields = [name for name in _RECURRENT_FIELDS if getattr(config, name, None)]
    if recurrent or fields or _is_recurrent(getattr(config, "model_type", "")):
        what = ", ".join(recurrent or fields) or config.model_type
        raise UnsupportedModelError(
            f"{architecture} has recurrent layers ({what}); only models whose layers are all attention are supported, "
            "since their state fits no KV cache."
        )
    if odd:
        raise UnsupportedModelError(
            f"{architecture} has layers of kind {', '.join(odd)}; known are {', '.join(sorted(KNOWN_LAYERS))}."
        )


def refuse_class(kind: Any, architecture: str) -> None:
    """Judge by the modelling class.

    Raises:
        UnsupportedModelError: it keeps state of its own, or its attention cannot be exchanged.
    """
    if getattr(kind, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{architecture} keeps recurrent state between tokens; only models whose layers "
            "are all attention are supported."
        )
    if not getattr(kind, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{architecture}: its code in transformers has no exchangeable attention (AttentionInterface), so it "
            "cannot run over a paged cache."
        )


def refuse_modules(model: nn.Module, architecture: str) -> None:
    """Judge by what the model is made of.

    Raises:
        UnsupportedModelError: some module mixes tokens by other means than attention.
    """
    odd = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, (nn.Conv1d, nn.RNNBase)) or _is_recurrent(type(module).__name__)
        }
    )
    if odd:
        raise UnsupportedModelError(
            f"{architecture} has recurrent or convolutional layers ({', '.join(odd)}); only models whose layers are "
            "all attention are supported."
        )
