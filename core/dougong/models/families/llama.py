"""Llama, Mistral and what shares their code: bias where the config says so, a window on every layer or on none."""

from __future__ import annotations

from dougong.models.families.decoder import Decoder

__all__ = ["LlamaForCausalLM"]


class LlamaForCausalLM(Decoder):
    """The shared decoder as it is."""
