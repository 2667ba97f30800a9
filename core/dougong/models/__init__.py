"""Models: layers, one file per family, configs, weight loading and quantisation formats."""

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
