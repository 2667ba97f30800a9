"""Decoders without a native family run through transformers' code with this core's attention; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import PagedModel

from dougong.errors import UnsupportedModelError
from dougong.hal import Backend
from dougong.models import LoadedModel
from tests.models.conftest import save_model

LENGTH = 19
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5, "num_key_value_heads": None}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "starcoder2-window": ("Starcoder2", {"sliding_window": 6}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"sliding_window": 6, "head_dim": 8}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "smollm3": ("SmolLM3", {}),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("Mamba", {"state_size": 4}, "recurrent"),
    "qwen3-next": ("Qwen3Next", {"head_dim": 8, "num_hidden_layers": 4, "num_experts": 4}, "linear_attention"),
    "jamba": ("Jamba", {"num_experts": 2, "mamba_d_state": 4}, "recurrent"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "rwkv": ("Rwkv", {}, "recurrent"),
    "stablelm": ("StableLm", {}, "no exchangeable attention"),
}


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_equal_transformers(
    name: str, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    kind, changes = MODELS[name]
    theirs = save_model(tmp_path, kind, **changes)
    ours = load(tmp_path)
    assert type(ours.model).__name__ == "TransformersForCausalLM"
    first, second = ids(LENGTH), ids(9, 1)
    with torch.inference_mode():
        want, want_second = (
            theirs(input_ids=torch.tensor([one]), use_cache=False).logits[0] for one in (first, second)
        )
    torch.testing.assert_close(PagedModel(ours.model, backend).run(first, (7, 1, 4)), want, atol=3e-5, rtol=3e-4)
    paged = PagedModel(ours.model, backend, sequences=2)
    paged.step([(0, first[:-1])])
    last, other = paged.step([(0, first[-1:]), (1, second)])
    torch.testing.assert_close(last, want[-1:], atol=3e-5, rtol=3e-4)
    torch.testing.assert_close(other, want_second, atol=3e-5, rtol=3e-4)


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_cannot_run_are_refused_with_the_reason(
    name: str, tmp_path: Path, load: Callable[..., LoadedModel]
) -> None:
    import transformers

    from tests.models.conftest import SIZES

    kind, changes, reason = REFUSED[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    config.architectures = [f"{kind}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path, load_format="dummy")


def test_quantized_products_reach_bridged_models(
    tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    theirs = save_model(tmp_path, "Olmo2")
    ours = load(tmp_path, quantization="int8")
    tokens = ids(LENGTH)
    with torch.inference_mode():
        want = theirs(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    got = PagedModel(ours.model, backend).run(tokens, (LENGTH,))
    assert "linear (int8)" in ours.model.choices
    difference = (got - want).abs().mean() / want.abs().mean()
    assert 1e-6 < difference < 0.05


def test_dummy_weights_need_only_a_config(tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]) -> None:
    save_model(tmp_path, "Granite")
    (tmp_path / "model.safetensors").unlink()
    one, two = (load(tmp_path, load_format="dummy", seed=5) for _ in range(2))
    tokens = ids(4)
    first, second = (PagedModel(each.model, backend).run(tokens, (4,)) for each in (one, two))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
