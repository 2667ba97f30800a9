"""Writes small GGUF files with ggml's own writer and quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",  # Phi-3's
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
#: Gemma's norms.
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str, gemma: bool = False) -> str:
    if name in _TOP:
        return _TOP[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, index, rest = name.split(".", 3)
    stem, _, kind = rest.rpartition(".")
    return f"blk.{index}.{({**_LAYER, **_SANDWICH} if gemma else _LAYER)[stem]}.{kind}"


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of query and key in GGUF's order: within a head 0, D/2, 1, D/2+1 …"""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    kind: str,
    *,
    architecture: str = "llama",
    values: Mapping[str, Any] | None = None,
    vectors: Mapping[str, torch.Tensor] | None = None,
    **metadata: Any,
) -> None:
    """A transformers model as a GGUF file, as ggml's converter for ``architecture`` writes it; matrices in block format
    ``kind``, the embedding in F16, norms in F32. ``values`` go into the metadata, ``vectors`` among the tensors."""
    config = model.config
    gemma, permuted = architecture.startswith("gemma"), architecture in ("llama", "mistral")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in (values or {}).items():
        add: Any = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[value.__class__]
        add(key, value)
    _add_tokenizer(writer, config)
    for name, vector in (vectors or {}).items():
        writer.add_tensor(name, vector.numpy().astype(np.float32))
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if gemma and name.endswith("norm.weight"):
            weight = weight + 1
        if permuted and ".q_proj." in name:
            weight = interleave(weight, config.num_attention_heads)
        elif permuted and ".k_proj." in name:
            weight = interleave(weight, config.num_key_value_heads)
        values = weight.float().numpy()
        stored = "F32" if values.ndim == 1 else "F16" if "embed" in name else kind
        type = gguf.GGMLQuantizationType[stored]
        if stored in ("F32", "F16"):
            writer.add_tensor(gguf_name(name, gemma), values.astype({"F32": np.float32, "F16": np.float16}[stored]))
        else:
            writer.add_tensor(gguf_name(name, gemma), gguf.quants.quantize(values, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, config: Any) -> None:
    """Byte-level BPE: three special tokens, printable letters, one merge."""
    letters = [chr(code) for code in range(ord("!"), ord("!") + 80)] + ["Ġ"]
    tokens = ["<pad>", "<s>", "</s>", *letters, "he"]
    tokens += [f"<unused{index}>" for index in range(config.vocab_size - len(tokens))]
    special = {index for index, token in enumerate(tokens) if token.startswith("<") and len(token) > 1}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
