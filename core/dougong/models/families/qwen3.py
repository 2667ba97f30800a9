"""Qwen3: a norm over each head of query and key."""

from __future__ import annotations

from dougong.models.families.decoder import Decoder, DecoderLayer

__all__ = ["Qwen3ForCausalLM"]


class Qwen3Layer(DecoderLayer):
    qk_norm = True


class Qwen3ForCausalLM(Decoder):
    layer_type = Qwen3Layer
