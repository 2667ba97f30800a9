"""Qwen3-MoE: Qwen3 with experts in place of the feed-forward block of most layers."""

from __future__ import annotations

from dougong.models.build import Builder
from dougong.models.families.decoder import Decoder, DecoderLayer, FeedForward
from dougong.models.layers.mlp import MLP
from dougong.models.layers.moe import MoE

__all__ = ["Qwen3MoeForCausalLM"]


class Qwen3MoeLayer(DecoderLayer):
    qk_norm = True

    def make_feed_forward(self, build: Builder) -> FeedForward:
        config = build.config
        if not config.layers[self.index].experts:
            return MLP(build, f"{self.prefix}.mlp")
        return MoE(
            build,
            f"{self.prefix}.mlp",
            intermediate=config.hf.moe_intermediate_size,
            normalize=bool(config.hf.norm_topk_prob),
            round_weights=True,
        )


class Qwen3MoeForCausalLM(Decoder):
    layer_type = Qwen3MoeLayer
    capturable = False
