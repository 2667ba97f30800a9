"""Every native family gives transformers' fp32 logits over a paged cache, however its tokens are fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import PagedModel

from dougong.hal import NZ16, Backend
from dougong.models import LoadedModel
from tests.models.conftest import save_model

LENGTH = 23
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LOCAL_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 6, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 6, "layer_types": SLIDING, "rope_parameters": LOCAL_ROPE},
    ),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}

Pair = tuple[Any, LoadedModel]


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Pair:
    """transformers' model and ours from the same folder."""
    from dougong.config import EngineConfig
    from dougong.models import load_model

    kind, changes = FAMILIES[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs = save_model(folder, kind, **changes)
    ours = load_model(EngineConfig(model=str(folder), dtype="float32"), backend)
    assert "families" in type(ours.model).__module__
    assert "bridge" not in type(ours.model).__module__
    return theirs, ours


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected(theirs: Any, tokens: list[int]) -> torch.Tensor:
    return theirs(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("chunks", [(LENGTH,), (7, 7, 9), (1,), (11, 1)], ids=str)
def test_logits_equal_transformers_however_chunked(pair: Pair, backend: Backend, chunks: tuple[int, ...]) -> None:
    theirs, ours = pair
    tokens = ids(LENGTH)
    logits = PagedModel(ours.model, backend).run(tokens, chunks)
    torch.testing.assert_close(logits, expected(theirs, tokens), atol=2e-5, rtol=2e-4)


def test_rows_of_a_mixed_batch_do_not_touch_each_other(pair: Pair, backend: Backend) -> None:
    theirs, ours = pair
    first, second, third = ids(12, 1), ids(9, 2), ids(5, 3)
    paged = PagedModel(ours.model, backend, sequences=3)
    paged.step([(0, first[:11])])
    # a decode row, a whole prompt and the first chunk of another in one step
    a, b, c = paged.step([(0, first[11:]), (1, second), (2, third[:2])])
    d, e = paged.step([(2, third[2:]), (0, [7])])
    torch.testing.assert_close(a, expected(theirs, first)[11:], atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(b, expected(theirs, second), atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(torch.cat((c, d)), expected(theirs, third), atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(e, expected(theirs, [*first, 7])[12:], atol=2e-5, rtol=2e-4)


def test_greedy_tokens_equal_generate(pair: Pair, backend: Backend) -> None:
    theirs, ours = pair
    prompt = ids(6, 4)
    with torch.inference_mode():
        want = theirs.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    paged = PagedModel(ours.model, backend)
    got = [int(paged.step([(0, prompt)])[0][-1].argmax())]
    while len(got) < len(want):
        got.append(int(paged.step([(0, got[-1:])])[0][-1].argmax()))
    assert got == want


def test_config_names_what_the_cache_needs(pair: Pair) -> None:
    theirs, ours = pair
    config = ours.config
    assert [attention.layer_index for attention in ours.model.attentions] == list(range(config.num_layers))
    for attention, layer in zip(ours.model.attentions, theirs.model.layers):
        window = getattr(layer.self_attn, "sliding_window", None)
        if hasattr(theirs.config, "layer_types") and theirs.config.layer_types:
            window = window if theirs.config.layer_types[attention.layer_index] == "sliding_attention" else None
        elif window is None:
            window = getattr(theirs.config, "sliding_window", None)
        assert attention.spec.window == window
        assert attention.spec.scale == pytest.approx(layer.self_attn.scaling)


def test_bfloat16_follows_transformers(tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]) -> None:
    theirs = save_model(tmp_path, "Llama").to(torch.bfloat16)
    ours = load(tmp_path, dtype="bfloat16")
    tokens = ids(LENGTH)
    got = PagedModel(ours.model, backend).run(tokens, (8,))
    want = expected(theirs, tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want.float()).abs().max() < 0.1


def test_another_layout_gives_the_same(tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]) -> None:
    theirs = save_model(tmp_path, "Qwen3", head_dim=16)
    ours = load(tmp_path)
    tokens = ids(LENGTH)
    got = PagedModel(ours.model, backend, layout=NZ16, block_size=16).run(tokens, (10,))
    torch.testing.assert_close(got, expected(theirs, tokens), atol=2e-5, rtol=2e-4)
