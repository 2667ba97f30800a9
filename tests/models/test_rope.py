"""Rope tables equal transformers' frequencies for every scaling, and whole models agree with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import PagedModel

from dougong.errors import ModelLoadError, UnsupportedModelError
from dougong.hal import Backend
from dougong.models import LoadedModel, RopeConfig
from dougong.models.layers.rope import rope_table
from tests.models.conftest import save_model

TRAINED = 16
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [2.0, 3.0, 5.0, 9.0]}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": TRAINED, **FACTORS},
}


def ids(count: int) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(9)).tolist()


def rope_of(name: str, **changes: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **SCALINGS[name], **changes}


@pytest.mark.parametrize("name", list(SCALINGS))
def test_models_agree_with_transformers(
    name: str, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    theirs = save_model(tmp_path, "Llama", rope_parameters=rope_of(name), max_position_embeddings=64)
    ours = load(tmp_path)
    # transformers chooses longrope's factors by each sequence, dougong by the longest it may run: both long here
    tokens = ids(40)
    with torch.inference_mode():
        want = theirs(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    got = PagedModel(ours.model, backend).run(tokens, (40,))
    torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-4)


def test_longrope_takes_short_factors_where_no_sequence_outgrows_them(
    tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    theirs = save_model(tmp_path, "Phi3", rope_parameters=rope_of("longrope"), original_max_position_embeddings=TRAINED)
    tokens = ids(TRAINED)
    with torch.inference_mode():
        want = theirs(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    short = PagedModel(load(tmp_path, max_model_len=TRAINED).model, backend).run(tokens, (TRAINED,))
    torch.testing.assert_close(short, want, atol=3e-5, rtol=3e-4)
    long = PagedModel(load(tmp_path).model, backend).run(tokens, (TRAINED,))
    assert (long - want).abs().max() > 1e-2


def test_partial_rotation(tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]) -> None:
    theirs = save_model(tmp_path, "Phi3", rope_parameters=rope_of("default", partial_rotary_factor=0.5))
    ours = load(tmp_path)
    assert ours.model.attentions[0].table.rotary_dim == 4  # type: ignore[attr-defined]
    tokens = ids(20)
    with torch.inference_mode():
        want = theirs(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(PagedModel(ours.model, backend).run(tokens, (20,)), want, atol=3e-5, rtol=3e-4)


def test_dynamic_scaling_beyond_the_trained_length_is_that_of_token_by_token_decoding(
    tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    theirs = save_model(tmp_path, "Llama", rope_parameters=rope_of("dynamic"), max_position_embeddings=TRAINED)
    ours = load(tmp_path)
    assert ours.max_len == 3 * TRAINED
    tokens = ids(TRAINED + 9)
    with torch.inference_mode():
        done = theirs(input_ids=torch.tensor([tokens[:TRAINED]]), use_cache=True)
        want = [done.logits[0]]
        for token in tokens[TRAINED:]:
            done = theirs(input_ids=torch.tensor([[token]]), past_key_values=done.past_key_values, use_cache=True)
            want.append(done.logits[0])
    for chunks in ((1,), (len(tokens),), (TRAINED + 3, 2)):
        got = PagedModel(ours.model, backend).run(tokens, chunks)
        torch.testing.assert_close(got, torch.cat(want), atol=3e-5, rtol=3e-4)


def test_interleaved_tables_say_so() -> None:
    table = rope_table(RopeConfig(rotary_dim=8, max_positions=32, interleaved=True), 10, "cpu")
    assert table.interleaved
    assert table.cos_sin.shape == (10, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": "spiral"}, UnsupportedModelError, "'spiral': known are default, linear"),
        ({"type": "linear"}, ModelLoadError, "'linear' in the config lack 'factor'"),
        (
            {"type": "longrope", "parameters": {"original_max_position_embeddings": 8, **FACTORS}, "rotary_dim": 16},
            ModelLoadError,
            "4 factors for 16 rotated",
        ),
    ],
)
def test_bad_parameters_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rope_table(RopeConfig(**{"rotary_dim": 8, "max_positions": 32, **changes}), 16, "cpu")
