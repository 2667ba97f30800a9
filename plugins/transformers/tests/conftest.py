"""Small random models, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dougong_transformers
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    # A window shorter than the prompts, so that caches wrap.
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=9),
    "gemma2": lambda: Gemma2Config(
        **SIZES, sliding_window=9, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, final_logit_softcapping=None
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, sliding_window=9, num_local_experts=2, num_experts_per_tok=1),
}


def make(family: str, implementation: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=implementation, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.mul_(4)  # far from ties
    return model.eval()


@pytest.fixture
def pair() -> Callable[[str], tuple[Any, Any]]:
    """A model with dougong's attention, and the same one with transformers' own (eager where sdpa cannot)."""

    def both(family: str) -> tuple[Any, Any]:
        theirs = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"
        return make(family, dougong_transformers.NAME), make(family, theirs)

    return both


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
