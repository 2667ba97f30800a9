"""A config read without transformers is the one that transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dougong.models.config import ModelConfig
from dougong.models.loading.load import read_config
from dougong.models.loading.plain_config import plain_config

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "llama of transformers 4": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "mlp_bias": False},
    "llama, plain rope": {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None, "attention_bias": True},
    "llama, linear rope": {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama of transformers 5": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "llama, several ends": {"model_type": "llama", "rope_theta": 1e4, "eos_token_id": [2, 5], "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 128},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 32, "sliding_window": None, "max_window_layers": 3},
}
LEFT: dict[str, dict[str, Any]] = {
    "a family not listed": {"model_type": "mixtral", "rope_theta": 1e4},
    "no rope": {"model_type": "llama"},
    "yarn": {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "windows": {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": True, "sliding_window": 32},
    "a head dim by default": {"model_type": "qwen3", "rope_theta": 1e6},
    "a size that is no number": {"model_type": "llama", "rope_theta": 1e4, "hidden_size": "64"},
    "quantised": {"model_type": "llama", "rope_theta": 1e4, "quantization_config": {"quant_method": "awq"}},
}


def write(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **SIZES, **fields}))


@pytest.mark.parametrize("name", WHOLE)
def test_both_ways_give_the_same(name: str, tmp_path: Path) -> None:
    write(tmp_path, WHOLE[name])
    quick = read_config(tmp_path)
    slow = ModelConfig.from_transformers(AutoConfig.from_pretrained(str(tmp_path)))
    assert quick == slow
    for key, rope in slow.ropes.items():
        wanted = {k: v for k, v in rope.parameters.items() if k != "type"}
        assert {k: v for k, v in quick.ropes[key].parameters.items() if k != "type"} == wanted


@pytest.mark.parametrize("name", LEFT)
def test_transformers_reads_what_needs_it(name: str) -> None:
    assert plain_config({**SIZES, **LEFT[name]}) is None


@pytest.mark.parametrize("missing", sorted(SIZES.keys() - {"torch_dtype"}))
def test_a_missing_field_is_transformers_to_fill(missing: str) -> None:
    content = {**SIZES, **WHOLE["qwen3"]}
    del content[missing]
    assert plain_config(content) is None


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    write(tmp_path, WHOLE["qwen3"])
    code = (
        "import sys, pathlib; from dougong.models.loading.load import read_config; "
        f"read_config(pathlib.Path({str(tmp_path)!r})); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
