"""Small random models of every family, saved by transformers, and the backend that they run on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from model_harness import host_backend

from dougong.config import EngineConfig
from dougong.hal import Backend
from dougong.models import LoadedModel, load_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def backend() -> Backend:
    return host_backend()


def save_model(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of config class ``kind`` saved to ``folder``; weights large enough to matter."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # Norm weights and biases that are not ones and zeros, so that a forgotten one shows.
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.15 if "embed" not in name else 0.6)
    model.eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def load(backend: Backend) -> Callable[..., LoadedModel]:
    def run(folder: Path | str, **options: Any) -> LoadedModel:
        return load_model(EngineConfig(model=str(folder), **{"dtype": "float32", **options}), backend)

    return run
