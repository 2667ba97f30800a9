"""GGUF's names and metadata in transformers' terms, for the architectures that have a native family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dougong.errors import ModelLoadError, UnsupportedModelError

__all__ = ["COMPLETE_CONFIGS", "ROPE_FACTORS", "GGUFArchitecture", "architecture_of", "config_dict"]

#: Model types for which ``config_dict`` leaves nothing to transformers' defaults.
COMPLETE_CONFIGS = frozenset({"llama", "qwen2", "qwen3"})

#: Tensors that divide the rope's frequencies: Llama 3's for all lengths, Phi-3's for short and for long ones.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


@dataclass(frozen=True, kw_only=True)
class GGUFArchitecture:
    """How one ``general.architecture`` differs.

    ``permuted``: rows of query and key lie in pairs for interleaved rope and are put back. ``norm_plus_one``: norms
    were stored with the 1 already added. ``names`` replace or add to the layers' names.
    """

    model_type: str
    architecture: str
    permuted: bool = False
    norm_plus_one: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def transformers_name(self, name: str) -> str | None:
        """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for what models do not read."""
        fixed = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        if name in fixed:
            return fixed[name]
        if name in ROPE_FACTORS:  # they go into the config
            return None
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk":
            return name
        table = {**_LAYER, **self.names}
        tail = ".".join(parts[2:])
        target = table.get(tail) or (f"{table[parts[2]]}.{parts[3]}" if parts[2] in table else None)
        return f"model.layers.{parts[1]}.{target}" if target else name


_ARCHITECTURES = {
    "llama": GGUFArchitecture(model_type="llama", architecture="LlamaForCausalLM", permuted=True),
    "mistral": GGUFArchitecture(model_type="mistral", architecture="MistralForCausalLM", permuted=True),
    "qwen2": GGUFArchitecture(model_type="qwen2", architecture="Qwen2ForCausalLM"),
    "qwen3": GGUFArchitecture(model_type="qwen3", architecture="Qwen3ForCausalLM"),
    "gemma2": GGUFArchitecture(
        model_type="gemma2", architecture="Gemma2ForCausalLM", norm_plus_one=True, names=_SANDWICH
    ),
    "gemma3": GGUFArchitecture(
        model_type="gemma3_text", architecture="Gemma3ForCausalLM", norm_plus_one=True, names=_SANDWICH
    ),
    "phi3": GGUFArchitecture(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
}


def architecture_of(metadata: Mapping[str, Any], path: object) -> GGUFArchitecture:
    """The file's architecture.

    Raises:
        UnsupportedModelError: none of those known (a llama file with experts is a Mixtral, whose blocks are stacked).
    """
    name = metadata.get("general.architecture")
    found = _ARCHITECTURES.get(str(name))
    if found is None or metadata.get(f"{name}.expert_count"):
        raise UnsupportedModelError(
            f"{path} holds a model of architecture {name!r}"
            f"{' with experts' if found else ''}; from GGUF are read: {', '.join(_ARCHITECTURES)}. Others load from "
            "safetensors."
        )
    return found


def config_dict(
    metadata: Mapping[str, Any],
    path: object,
    *,
    tied: bool,
    vocab_size: int,
    rope_factors: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """config.json's content from a file's metadata and its tensors `ROPE_FACTORS`.

    Raises:
        ModelLoadError: a value that the architecture needs is missing or makes no sense.
        UnsupportedModelError: a rope scaling that is not known.
    """
    arch = str(metadata["general.architecture"])
    known = architecture_of(metadata, path)

    def need(key: str) -> Any:
        try:
            return metadata[f"{arch}.{key}"]
        except KeyError:
            raise ModelLoadError(f"{path} lacks {arch}.{key} in its metadata; convert the model anew.") from None

    def need_size(key: str) -> int:
        value = need(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelLoadError(f"{path} has {arch}.{key} = {value!r} in its metadata; expected an integer >= 1.")
        return value

    heads = need_size("attention.head_count")
    hidden = need_size("embedding_length")
    head_dim = metadata.get(f"{arch}.attention.key_length") or hidden // heads
    config: dict[str, Any] = {
        "architectures": [known.architecture],
        "model_type": known.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need_size("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    config.update(_rope(metadata, arch, head_dim, path, rope_factors))
    window = metadata.get(f"{arch}.attention.sliding_window")
    if arch in ("mistral", "phi3", "gemma2", "gemma3"):
        # Named even where there is none: transformers' own default is a window.
        config["sliding_window"] = window or None
    for theirs, ours in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping",) * 2):
        if f"{arch}.{theirs}" in metadata:
            config[ours] = metadata[f"{arch}.{theirs}"]
    if arch == "phi3":  # transformers' own default wins over what stands in rope_parameters
        trained = metadata.get("phi3.rope.scaling.original_context_length")
        config["original_max_position_embeddings"] = trained or config["max_position_embeddings"]
    if arch.startswith("gemma"):
        config["query_pre_attn_scalar"] = _gemma_scalar(arch, config)
    for theirs, ours in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None:
            config[ours] = value
    # The end of the text, of a turn and of a message: whichever comes first ends an answer.
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known_ends = list(dict.fromkeys(one for one in ends if one is not None))
    if known_ends:
        config["eos_token_id"] = known_ends if len(known_ends) > 1 else known_ends[0]
    return config


def _rope(
    metadata: Mapping[str, Any], arch: str, head_dim: int, path: object, factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    theta = metadata.get(f"{arch}.rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn", *(("longrope",) if factors else ())):
        raise UnsupportedModelError(f"{path}: rope scaling {kind!r}; from GGUF are read: none, linear, yarn, longrope.")
    if factors:
        if kind in ("linear", "yarn"):
            raise UnsupportedModelError(
                f"{path}: rope scaling {kind!r} beside factors of single frequencies ({', '.join(factors)}); from GGUF "
                "one of the two is read."
            )
        rope.update(_single_factors(metadata, arch, path, factors))
    elif kind != "none":
        rope.update(rope_type=kind, factor=metadata.get(f"{arch}.rope.scaling.factor", 1.0))
        trained = metadata.get(f"{arch}.rope.scaling.original_context_length")
        if trained:
            rope["original_max_position_embeddings"] = trained
    rotated = metadata.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    if arch == "gemma3":
        local = {"rope_type": "default", "rope_theta": metadata.get("gemma3.rope.local.freq_base", 10000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    return {"rope_parameters": rope}


def _single_factors(
    metadata: Mapping[str, Any], arch: str, path: object, factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Each frequency divided by a factor of its own, as transformers' longrope says it. Llama 3's smooth scaling is
    stored so too, with one set of factors for all lengths."""
    freqs, short, long = (factors.get(name) for name in ROPE_FACTORS)
    if freqs is not None:
        short = long = freqs
    if short is None or long is None:
        raise ModelLoadError(f"{path} holds {', '.join(factors)} alone: short and long factors belong together.")
    context = metadata[f"{arch}.context_length"]
    trained = metadata.get(f"{arch}.rope.scaling.original_context_length") or context
    return {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "factor": max(1.0, context / trained),
        "original_max_position_embeddings": trained,
        "attention_factor": float(metadata.get(f"{arch}.rope.scaling.attn_factor") or 1.0),
    }


def _gemma_scalar(arch: str, config: Mapping[str, Any]) -> int:
    """GGUF does not say it: the 27B models scale by hidden size over heads, the others by the head size."""
    biggest = {"gemma2": 46, "gemma3": 62}[arch]
    if config["num_hidden_layers"] == biggest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])
