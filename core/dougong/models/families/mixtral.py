"""Mixtral: Mistral with eight experts in place of each feed-forward block."""

from __future__ import annotations

from dougong.models.build import Builder
from dougong.models.families.decoder import Decoder, DecoderLayer, FeedForward
from dougong.models.layers.moe import MoE

__all__ = ["MixtralForCausalLM"]


class MixtralLayer(DecoderLayer):
    def make_feed_forward(self, build: Builder) -> FeedForward:
        return MoE(
            build,
            f"{self.prefix}.block_sparse_moe",
            names=("w1", "w3", "w2"),
            intermediate=build.config.intermediate_size,
        )


class MixtralForCausalLM(Decoder):
    layer_type = MixtralLayer
    capturable = False
