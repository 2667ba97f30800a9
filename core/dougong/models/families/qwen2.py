"""Qwen2: bias on query, key and value only; a window on the layers that the config names."""

from __future__ import annotations

from dougong.models.build import Builder
from dougong.models.families.decoder import Decoder, DecoderLayer

__all__ = ["Qwen2ForCausalLM"]


class Qwen2Layer(DecoderLayer):
    qkv_bias = True

    def has_out_bias(self, build: Builder) -> bool:
        return False


class Qwen2ForCausalLM(Decoder):
    layer_type = Qwen2Layer
