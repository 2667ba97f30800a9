"""Puts the harness beside the tests on the path, and makes one small model for all of them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two small Llama layers."""
    return _folder(
        tmp_path_factory,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=2,
    )


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of four small Gemma 3 layers: windows of 8 tokens, and full attention in every second one."""
    return _folder(
        tmp_path_factory,
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=16,
    )


def _folder(factory: pytest.TempPathFactory, **values: object) -> Path:
    folder = factory.mktemp("model")
    config = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        **values,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
