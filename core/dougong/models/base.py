"""What every model looks like to the runner."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import nn

from dougong.hal import Choice
from dougong.models.build import Builder
from dougong.models.config import ModelConfig
from dougong.models.context import StepContext
from dougong.models.layers.attention import AttentionLayer
from dougong.models.weights import WeightSource, WeightSpec

__all__ = ["CausalLM", "Loadable"]


class Loadable(Protocol):
    """A part of a model that has weights."""

    def weights(self) -> Iterator[WeightSpec]: ...

    def load(self, source: WeightSource) -> None: ...


class CausalLM(nn.Module):
    """A decoder over paged caches.

    ``attentions`` are the layers' attentions in order; the runner groups them by ``spec`` and binds each. Nothing in
    ``forward`` or ``logits`` synchronises with the host or depends on data, so both can be captured.
    """

    config: ModelConfig
    attentions: list[AttentionLayer]
    choices: dict[str, Choice]
    """What the matrix products run on, by format."""

    #: Parts of names that a checkpoint may hold and that are not read.
    ignored_weights: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq", ".masked_bias")
    #: Whether ``forward`` may be recorded into a device graph.
    capturable: ClassVar[bool] = True

    def __init__(self, build: Builder) -> None:
        super().__init__()
        self.config = build.config
        self.dtype = build.dtype
        self.device = build.device
        self.choices = build.choices
        self.attentions = []

    @abstractmethod
    def parts(self) -> Iterator[Loadable]:
        """Everything that has weights, in the order of loading."""

    @abstractmethod
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """input_ids [T] int64, positions [T] int64 -> hidden [T, E], the last norm applied."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, E] -> [R, V] in the model's dtype, complete on every rank."""

    def load(self, source: WeightSource) -> None:
        """Fill the model from ``source``, part by part; no more than one part is held twice.

        Raises:
            ModelLoadError: the source lacks tensors, or holds others.
        """
        ignored = self.ignored_weights
        if self.config.tie_word_embeddings:
            ignored = (*ignored, "lm_head.weight")
        source.check((spec for part in self.parts() for spec in part.weights()), ignored)
        for part in self.parts():
            part.load(source)
