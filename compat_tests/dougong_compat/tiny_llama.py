"""Two-layer models: their files for the engine, and their forward pass in float64 with contiguous K and V.

In float32 a seeded random one, where every key counts a little; in 16-bit types the one of ``coded_llama``.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dougong_compat.coded_llama import CODED, coded_weights

__all__ = ["config", "logits", "weights", "write_files"]

_RANDOM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 128,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "float32",
}  # fmt: skip


def config(dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json."""
    chosen = _RANDOM if dtype.itemsize > 2 else CODED
    return {**chosen, "torch_dtype": str(dtype).removeprefix("torch.")}


@lru_cache(maxsize=4)
def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights by their names in the files, rounded to ``dtype``."""
    return _random_weights(dtype) if dtype.itemsize > 2 else coded_weights(dtype)


def _random_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    c = _RANDOM
    generator = torch.Generator().manual_seed(20)
    E, H, K, D, F, V = (
        c[name] for name in
        ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
    )  # fmt: skip

    def draw(*shape: int, spread: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    out = {"model.embed_tokens.weight": draw(V, E, spread=1.0), "lm_head.weight": draw(V, E, spread=0.3)}
    for layer in range(c["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        # sharp attention: the answer hangs on single keys
        for name, rows, columns, spread in (
            ("self_attn.q_proj", H * D, E, 0.25),
            ("self_attn.k_proj", K * D, E, 0.25),
            ("self_attn.v_proj", K * D, E, 0.1),
            ("self_attn.o_proj", E, H * D, 0.1),
            ("mlp.gate_proj", F, E, 0.1),
            ("mlp.up_proj", F, E, 0.1),
            ("mlp.down_proj", E, F, 0.1),
        ):
            out[f"{base}{name}.weight"] = draw(rows, columns, spread=spread)
        out[f"{base}input_layernorm.weight"] = torch.ones(E, dtype=dtype)
        out[f"{base}post_attention_layernorm.weight"] = torch.ones(E, dtype=dtype)
    out["model.norm.weight"] = torch.ones(E, dtype=dtype)
    return out


def write_files(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """config.json and model.safetensors in ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(dtype)), encoding="utf-8")
    save_file(weights(dtype), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(_RANDOM["rms_norm_eps"]))


def logits(tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """float64 logits [T, V] at every position."""
    c, w = config(dtype), {name: value.double() for name, value in weights(dtype).items()}
    H, K, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    T = len(tokens)
    position = torch.arange(T).double()[:, None]
    angle = position / c["rope_theta"] ** (torch.arange(0, D, 2).double() / D)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    hidden_mask = torch.ones(T, T).triu(1).bool()
    x = w["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer in range(c["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        y = _norm(x)
        q = turn((y @ w[f"{base}self_attn.q_proj.weight"].T).view(T, H, D))
        k = turn((y @ w[f"{base}self_attn.k_proj.weight"].T).view(T, K, D)).repeat_interleave(H // K, 1)
        v = (y @ w[f"{base}self_attn.v_proj.weight"].T).view(T, K, D).repeat_interleave(H // K, 1)
        scores = torch.einsum("qhd,shd->hqs", q, k) * D**-0.5
        p = scores.masked_fill(hidden_mask, -torch.inf).softmax(-1)
        x = x + torch.einsum("hqs,shd->qhd", p, v).reshape(T, H * D) @ w[f"{base}self_attn.o_proj.weight"].T
        y = _norm(x)
        gate = torch.nn.functional.silu(y @ w[f"{base}mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[f"{base}mlp.up_proj.weight"].T)) @ w[f"{base}mlp.down_proj.weight"].T
    return _norm(x) @ w["lm_head.weight"].T
