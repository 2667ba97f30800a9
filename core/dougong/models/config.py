"""A model's configuration as this core reads it: a frozen view over transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.errors import ConfigError, ModelLoadError, UnsupportedModelError
from dougong.hal import AttentionSpec

__all__ = ["LayerConfig", "ModelConfig", "RopeConfig", "torch_dtype"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        ConfigError: models do not run in it.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise ConfigError(f"dtype {name!r}: models run in one of {', '.join(_DTYPES)}.") from None


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of some layers: ``type`` and ``parameters`` as in config.json's ``rope_parameters``.

    ``rotary_dim`` is the number of rotated elements of a head (its first ones).
    """

    type: str = "default"
    theta: float = 10000.0
    rotary_dim: int
    max_positions: int
    """``max_position_embeddings`` of the config."""
    parameters: Mapping[str, Any] = field(default_factory=dict, compare=False)
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What differs between the layers of one model. ``rope`` is a key of ``ModelConfig.ropes``, '' for none."""

    window: int | None = None
    rope: str = "full_attention"
    experts: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model as a whole, before it is divided over ranks.

    ``hf`` is transformers' text config, for what only one family knows. Sizes are those of the config file.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    ropes: Mapping[str, RopeConfig]
    norm_eps: float
    activation: str
    scale: float
    """Attention logits are multiplied by it."""
    softcap: float | None = None
    final_softcap: float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    tie_word_embeddings: bool = False
    headless: bool = False
    """The checkpoint has no head: it gives vectors, and no tokens that mean anything."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    max_positions: int
    """Longest sequence the model was made for, its rope's extension included."""
    dtype: torch.dtype = torch.bfloat16
    """The dtype the weights were saved in."""
    hf: Any = field(repr=False, compare=False)

    @classmethod
    def from_transformers(cls, config: Any, *, generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read transformers' config (of a multimodal model: its text part).

        ``generation`` is the content of generation_config.json; its eos ids win, as they do in ``generate``.

        Raises:
            ModelLoadError: a field every decoder needs is missing or makes no sense.
            UnsupportedModelError: it describes an encoder-decoder, or weights in a format that is not known here.
        """
        architectures = tuple(getattr(config, "architectures", None) or ())
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"model type {config.model_type!r} is an encoder-decoder; decoder-only models are supported."
            )
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        stored = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
        if stored:
            method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", "?")
            raise UnsupportedModelError(
                f"the weights are stored quantised ({method}); known are plain weights and GGUF. Take the plain "
                "checkpoint and ask for quantization='int8' or 'int4'."
            )
        sizes = {name: _size(text, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        heads = _size(text, "num_attention_heads")
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or sizes["hidden_size"] // heads
        layer_types = _layer_types(text, sizes["num_hidden_layers"])
        ropes = _ropes(text, head_dim)
        window = getattr(text, "sliding_window", None)
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
        scalar = getattr(text, "query_pre_attn_scalar", None)
        return cls(
            architecture=architectures[0] if architectures else "",
            model_type=text.model_type,
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            layers=tuple(
                LayerConfig(
                    window=window if kind == "sliding_attention" else None,
                    rope=(kind if kind in ropes else "full_attention") if ropes else "",
                    experts=bool(experts) and _has_experts(text, index),
                )
                for index, kind in enumerate(layer_types)
            ),
            ropes=ropes,
            norm_eps=float(getattr(text, "rms_norm_eps", None) or getattr(text, "layer_norm_eps", None) or 1e-6),
            activation=getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None) or "silu",
            scale=float(scalar) ** -0.5 if scalar else float(head_dim) ** -0.5,
            softcap=getattr(text, "attn_logit_softcapping", None),
            final_softcap=getattr(text, "final_logit_softcapping", None),
            attention_bias=bool(getattr(text, "attention_bias", False)),
            mlp_bias=bool(getattr(text, "mlp_bias", False)),
            num_experts=experts,
            experts_per_token=getattr(text, "num_experts_per_tok", None) or 0,
            tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
            eos_token_ids=_eos(generation, text, config),
            bos_token_id=getattr(text, "bos_token_id", None),
            max_positions=_max_positions(text, ropes),
            dtype=_stored_dtype(config, text),
            hf=text,
        )

    def heads_of_rank(self, size: int) -> tuple[int, int]:
        """(query heads, kv heads) of each of ``size`` ranks. Kv heads are replicated where there are fewer than ranks.

        Raises:
            ConfigError: the heads cannot be divided so.
        """
        whole = self.num_kv_heads % size == 0 if self.num_kv_heads >= size else size % self.num_kv_heads == 0
        if self.num_heads % size or not whole:
            raise ConfigError(
                f"tensor_parallel_size={size}: {self.num_heads} query heads and {self.num_kv_heads} kv heads cannot be "
                "divided so; take a divisor of the query heads that divides the kv heads or is a multiple of them."
            )
        return self.num_heads // size, max(1, self.num_kv_heads // size)

    def attention_specs(
        self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, *, size: int = 1
    ) -> list[AttentionSpec]:
        """Each layer's attention as one of ``size`` ranks computes it."""
        heads, kv_heads = self.heads_of_rank(size)
        return [
            AttentionSpec(
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=self.head_dim,
                scale=self.scale,
                window=layer.window,
                softcap=self.softcap,
                dtype=dtype,
                kv_dtype=dtype if kv_dtype is None else kv_dtype,
            )
            for layer in self.layers
        ]


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelLoadError(
            f"the config of model type {getattr(config, 'model_type', '?')!r} has {name}={value!r}; a decoder needs a "
            "positive integer there. Is this the folder of a language model?"
        )
    return value


def _layer_types(config: Any, count: int) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        if len(kinds) != count:
            raise ModelLoadError(f"config.json names {len(kinds)} layer_types for {count} layers.")
        return list(kinds)
    every = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [every] * count


def _has_experts(config: Any, index: int) -> bool:
    step = getattr(config, "decoder_sparse_step", None) or 1
    return index not in (getattr(config, "mlp_only_layers", None) or ()) and (index + 1) % step == 0


def _ropes(config: Any, head_dim: int) -> dict[str, RopeConfig]:
    given = getattr(config, "rope_parameters", None)
    if not given:
        return {}
    nested = all(isinstance(value, Mapping) for value in given.values())
    ropes = {}
    for key, one in given.items() if nested else [("full_attention", given)]:
        share = one.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        ropes[key] = RopeConfig(
            type=one.get("rope_type", "default"),
            theta=float(one.get("rope_theta") or 10000.0),
            rotary_dim=int(head_dim * share),
            max_positions=getattr(config, "max_position_embeddings", None) or 2048,
            parameters=dict(one),
        )
    return ropes


def _max_positions(config: Any, ropes: Mapping[str, RopeConfig]) -> int:
    """The config's bound; linear and dynamic scaling stretch it, other kinds' configs name the stretched one."""
    bound = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    rope = ropes.get("full_attention")
    if rope is not None and rope.type in ("linear", "dynamic"):
        return int(bound * float(rope.parameters.get("factor") or 1.0))
    return int(bound)


def _eos(generation: Mapping[str, Any] | None, *configs: Any) -> tuple[int, ...]:
    candidates = [(generation or {}).get("eos_token_id"), *(getattr(one, "eos_token_id", None) for one in configs)]
    for value in candidates:
        if isinstance(value, int):
            return (value,)
        if value:
            return tuple(int(one) for one in value)
    return ()


def _stored_dtype(*configs: Any) -> torch.dtype:
    for config in configs:
        value = getattr(config, "dtype", None)
        if isinstance(value, str):
            value = _DTYPES.get(value.removeprefix("torch."))
        if isinstance(value, torch.dtype) and value in _DTYPES.values():
            return value
    return torch.float32
