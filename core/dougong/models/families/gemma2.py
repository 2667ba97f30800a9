"""Gemma 2: norms on both sides of each block, embeddings scaled, logits capped, every other layer with a window."""

from __future__ import annotations

from dougong.models.build import Builder
from dougong.models.families.decoder import Decoder, DecoderLayer

__all__ = ["Gemma2ForCausalLM", "Gemma2Layer"]


class Gemma2Layer(DecoderLayer):
    norm_offset = 1.0
    norm_names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )


class Gemma2ForCausalLM(Decoder):
    layer_type: type[DecoderLayer] = Gemma2Layer

    def embedding_scale(self, build: Builder) -> float:
        return float(build.config.hidden_size**0.5)
