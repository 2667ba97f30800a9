"""Phi-3: query, key and value in one matrix of the checkpoint, gate and up in another."""

from __future__ import annotations

from dougong.models.build import Builder
from dougong.models.families.decoder import Decoder, DecoderLayer, FeedForward
from dougong.models.layers.linear import Linear, Piece, qkv_rows
from dougong.models.layers.mlp import MLP
from dougong.models.weights import WeightSpec

__all__ = ["Phi3ForCausalLM"]


class Phi3Layer(DecoderLayer):
    def make_qkv(self, build: Builder) -> Linear:
        config = build.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        spec = WeightSpec(f"{self.prefix}.self_attn.qkv_proj.weight", (queries + 2 * keys, config.hidden_size))
        mine = [
            slice(first + part.start, first + part.stop)
            for first, part in zip((0, queries, queries + keys), qkv_rows(build))
        ]
        pieces = [Piece(spec, rows=rows) for rows in mine]
        return Linear(build, pieces, config.hidden_size, sum(rows.stop - rows.start for rows in mine))

    def make_feed_forward(self, build: Builder) -> FeedForward:
        config = build.config
        inner = config.intermediate_size
        spec = WeightSpec(f"{self.prefix}.mlp.gate_up_proj.weight", (2 * inner, config.hidden_size))
        mine = build.share(inner)
        pieces = [Piece(spec, rows=mine), Piece(spec, rows=slice(inner + mine.start, inner + mine.stop))]
        return MLP(
            build,
            f"{self.prefix}.mlp",
            gate_up=Linear(build, pieces, config.hidden_size, 2 * (mine.stop - mine.start)),
        )


class Phi3ForCausalLM(Decoder):
    layer_type = Phi3Layer
