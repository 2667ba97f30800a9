"""Checkpoints of a decoder without its head, as embedding models are published: `layers.0…` for `model.layers.0…`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dougong.hal import QuantizedWeight
from dougong.models.config import ModelConfig
from dougong.models.registry import native_architectures
from dougong.models.weights import ALL, WeightSource, WeightSpec

__all__ = ["named_as_with_head", "without_head"]

_PREFIX = "model."
#: What every decoder has, by its name in a checkpoint without head.
_EMBEDDING = "embed_tokens.weight"


def without_head(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config as the family with a head reads it, if the files in ``folder`` hold none; else ``config`` itself.

    The head is then the embedding, so that nothing else changes; what it gives means nothing.
    """
    family = config.architecture.removesuffix("Model") + "ForCausalLM"
    if config.architecture.endswith("Model") and family in native_architectures():
        config = replace(config, architecture=family)
    elif config.architecture not in native_architectures():
        return config
    if _EMBEDDING not in _names(folder):
        return config
    return replace(config, tie_word_embeddings=True, headless=not config.tie_word_embeddings)


def _names(folder: Path) -> set[str]:
    from safetensors import safe_open

    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                found.update(file.keys())
        except Exception:  # loading says what is wrong with it
            return set()
    return found


def named_as_with_head(source: WeightSource) -> WeightSource:
    """``source``, its tensors under the names that they have beside a head."""
    return _Prefixed(source) if _EMBEDDING in source.shapes() else source


class _Prefixed(WeightSource):
    """The tensors of ``source`` under the names that they have beside a head."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.description = source.description

    def shapes(self) -> Mapping[str, Sequence[int]]:
        return {_PREFIX + name: shape for name, shape in self._source.shapes().items()}

    def read(self, spec: WeightSpec, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        return self._source.read(self._own(spec), rows, columns)

    def read_quantized(self, spec: WeightSpec) -> QuantizedWeight | None:
        return self._source.read_quantized(self._own(spec))

    def close(self) -> None:
        self._source.close()

    @staticmethod
    def _own(spec: WeightSpec) -> WeightSpec:
        return replace(spec, name=spec.name.removeprefix(_PREFIX))
