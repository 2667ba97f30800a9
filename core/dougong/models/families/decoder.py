"""The decoder that native families share: pre-norm attention and gated feed-forward, residual carried in the norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from dougong.models.base import CausalLM, Loadable
from dougong.models.build import Builder
from dougong.models.context import StepContext
from dougong.models.layers.attention import Attention
from dougong.models.layers.embedding import Embedding, LMHead
from dougong.models.layers.linear import Linear, qkv_linear, row_linear
from dougong.models.layers.mlp import MLP
from dougong.models.layers.norm import RMSNorm

__all__ = ["Decoder", "DecoderLayer"]


class FeedForward(Loadable, Protocol):
    """A block of weights that maps x [T, E] to [T, E]."""

    def __call__(self, x: torch.Tensor, ctx: StepContext) -> torch.Tensor: ...


class DecoderLayer:
    """One layer. Families override the ``make_…`` methods; names are those of transformers' checkpoints."""

    qkv_bias = False
    out_bias = False
    qk_norm = False
    norm_offset = 0.0
    #: Names of the four norms: before attention, after it, before the feed-forward, after it. '' for none.
    norm_names = ("input_layernorm", "", "post_attention_layernorm", "")

    def __init__(self, build: Builder, prefix: str, index: int) -> None:
        config = build.config
        self.index = index
        self.prefix = prefix
        self.qkv = self.make_qkv(build)
        self.attention = self.make_attention(build)
        width = config.num_heads * config.head_dim
        self.out = row_linear(
            build, f"{prefix}.self_attn.o_proj", width, config.hidden_size, bias=self.has_out_bias(build)
        )
        self.feed_forward = self.make_feed_forward(build)
        norms = [self._norm(build, name, config.hidden_size) for name in self.norm_names]
        first, self.norm_after_attention, second, self.norm_after_feed_forward = norms
        assert first is not None and second is not None
        self.norm_attention, self.norm_feed_forward = first, second

    def _norm(self, build: Builder, name: str, size: int) -> RMSNorm | None:
        return RMSNorm(build, f"{self.prefix}.{name}", size, offset=self.norm_offset) if name else None

    def has_qkv_bias(self, build: Builder) -> bool:
        return self.qkv_bias or build.config.attention_bias

    def has_out_bias(self, build: Builder) -> bool:
        return self.out_bias or build.config.attention_bias

    def make_qkv(self, build: Builder) -> Linear:
        q, k, v = (f"{self.prefix}.self_attn.{name}_proj" for name in "qkv")
        return qkv_linear(build, (q, k, v), build.config.hidden_size, bias=self.has_qkv_bias(build))

    def make_attention(self, build: Builder) -> Attention:
        if not self.qk_norm:
            return Attention(build, self.index)
        q_norm = self._norm(build, "self_attn.q_norm", build.config.head_dim)
        k_norm = self._norm(build, "self_attn.k_norm", build.config.head_dim)
        return Attention(build, self.index, q_norm=q_norm, k_norm=k_norm)

    def make_feed_forward(self, build: Builder) -> FeedForward:
        return MLP(build, f"{self.prefix}.mlp")

    def parts(self) -> Iterator[Loadable]:
        yield self.norm_attention
        yield self.qkv
        yield self.attention
        yield self.out
        yield self.norm_feed_forward
        yield self.feed_forward
        for norm in (self.norm_after_attention, self.norm_after_feed_forward):
            if norm is not None:
                yield norm

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, ctx: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, E] is what the layer before adds to ``residual`` (None: x is the stream). Returns the same pair."""
        ops = ctx.ops
        norm = self.norm_attention
        if residual is None:
            residual = x
            x = ops.rms_norm(x, norm.weight, norm.eps, norm.offset)
        else:
            x, residual = ops.add_rms_norm(x, residual, norm.weight, norm.eps, norm.offset)
        x = self.out(self.attention(self.qkv(x), positions, ctx))
        after = self.norm_after_attention
        if after is not None:
            x = ops.rms_norm(x, after.weight, after.eps, after.offset)
        norm = self.norm_feed_forward
        x, residual = ops.add_rms_norm(x, residual, norm.weight, norm.eps, norm.offset)
        x = self.feed_forward(x, ctx)
        after = self.norm_after_feed_forward
        if after is not None:
            x = ops.rms_norm(x, after.weight, after.eps, after.offset)
        return x, residual


class Decoder(CausalLM):
    """Embedding, layers, last norm, LM head."""

    layer_type: type[DecoderLayer] = DecoderLayer
    prefix = "model"

    def __init__(self, build: Builder) -> None:
        super().__init__(build)
        config = build.config
        self.embedding = Embedding(build, f"{self.prefix}.embed_tokens", scale=self.embedding_scale(build))
        self.layers = [
            self.layer_type(build, f"{self.prefix}.layers.{index}", index) for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(build, f"{self.prefix}.norm", config.hidden_size, offset=self.layer_type.norm_offset)
        self.head = LMHead(build, "lm_head", tied=self.embedding if config.tie_word_embeddings else None)
        self.attentions = [layer.attention for layer in self.layers]

    def embedding_scale(self, build: Builder) -> float | None:
        return None

    def parts(self) -> Iterator[Loadable]:
        yield self.embedding
        for layer in self.layers:
            yield from layer.parts()
        yield self.norm
        yield self.head

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        x: torch.Tensor = self.embedding(input_ids)
        residual: torch.Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, positions, ctx)
        norm = self.norm
        assert residual is not None
        x, _ = ctx.ops.add_rms_norm(x, residual, norm.weight, norm.eps, norm.offset)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
