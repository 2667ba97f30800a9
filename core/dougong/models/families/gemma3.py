"""Gemma 3 (text): Gemma 2 with a norm over each head of query and key, and a rope of its own for windowed layers."""

from __future__ import annotations

from dougong.errors import UnsupportedModelError
from dougong.models.build import Builder
from dougong.models.families.gemma2 import Gemma2ForCausalLM, Gemma2Layer

__all__ = ["Gemma3ForCausalLM"]


class Gemma3Layer(Gemma2Layer):
    qk_norm = True


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    layer_type = Gemma3Layer

    def __init__(self, build: Builder) -> None:
        if getattr(build.config.hf, "use_bidirectional_attention", False):
            raise UnsupportedModelError(
                "this Gemma 3 config has use_bidirectional_attention (an embedding model); decoders are causal here."
            )
        super().__init__(build)
