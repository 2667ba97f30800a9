"""Models: layers, one file per family, configs, weight loading and quantisation formats.

Names are imported when they are first used: what makes or reads text needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.lazy import lazy_names

if TYPE_CHECKING:
    from dougong.models.base import CausalLM
    from dougong.models.build import Builder
    from dougong.models.config import LayerConfig, ModelConfig, RopeConfig
    from dougong.models.context import StepContext
    from dougong.models.identity import model_digest
    from dougong.models.loading.load import LoadedModel, load_model, read_config
    from dougong.models.loading.source import ModelFiles, resolve_model
    from dougong.models.quantization import WeightFormat
    from dougong.models.tokenizer import get_tokenizer
    from dougong.models.weights import WeightSource, WeightSpec

__all__ = [
    "Builder",
    "CausalLM",
    "LayerConfig",
    "LoadedModel",
    "ModelConfig",
    "ModelFiles",
    "RopeConfig",
    "StepContext",
    "WeightFormat",
    "WeightSource",
    "WeightSpec",
    "get_tokenizer",
    "load_model",
    "model_digest",
    "read_config",
    "resolve_model",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Builder": "dougong.models.build",
        "CausalLM": "dougong.models.base",
        "LayerConfig": "dougong.models.config",
        "LoadedModel": "dougong.models.loading.load",
        "ModelConfig": "dougong.models.config",
        "ModelFiles": "dougong.models.loading.source",
        "RopeConfig": "dougong.models.config",
        "StepContext": "dougong.models.context",
        "WeightFormat": "dougong.models.quantization",
        "WeightSource": "dougong.models.weights",
        "WeightSpec": "dougong.models.weights",
        "get_tokenizer": "dougong.models.tokenizer",
        "load_model": "dougong.models.loading.load",
        "model_digest": "dougong.models.identity",
        "read_config": "dougong.models.loading.load",
        "resolve_model": "dougong.models.loading.source",
    },
)
