#!/usr/bin/env python3
"""Weights for a config with which an engine's tokens show its attention.

    python benchmarks/peers/random_weights.py CONFIG_DIR OUT [--layers 4] [--seed 0]

Engines' own dummy weights are so small that the next token hangs on the last one alone: attention that answers zeros
gives the same tokens. These are transformers' initial weights, norms 1, with an embedding so small that layers add
more than it holds. The rows of the head, which is not the embedding, have lengths from e**-6 to e**6, so that the best
token is seldom a near tie; its logit lies between 1 and 8. Rounding to bfloat16 makes noise in every layer: with fewer
layers fewer tokens are near ties. Writes config.json and model.safetensors (bfloat16).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def write(config_dir: Path, out: Path, layers: int | None = None, seed: int = 0) -> None:
    """Write the folder; one that is there already is kept."""
    if out.exists():
        return
    config = AutoConfig.from_pretrained(config_dir)
    config.tie_word_embeddings = False
    config.initializer_range = 0.64 / config.hidden_size**0.5  # 0.02 at 1,024; layers of all sizes add the same
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    embedding.mul_(0.1 / config.initializer_range)
    lengths = torch.randn(head.shape[0], 1, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4) * 1.5
    # A final hidden state has elements of size 1, so that the longest row's logit is 2 times a normal number.
    head.mul_((lengths - 6).exp().to(head) * (2 / (config.initializer_range * config.hidden_size**0.5)))
    begun = out.with_name(out.name + ".part")
    model.save_pretrained(begun)
    begun.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="folder with config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="take the config's first (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if not (a.config / "config.json").is_file():
        parser.error(f"{a.config} holds no config.json: give the folder of a model's config")
    write(a.config, a.out, a.layers, a.seed)


if __name__ == "__main__":
    main()
