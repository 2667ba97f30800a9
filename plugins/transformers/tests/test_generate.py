"""generate() and forward(): the tokens and logits of transformers' own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dougong_transformers.masks import dougong_mask

Pair = Callable[[str], tuple[Any, Any]]
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt_oss"]
PROMPT = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30, 2, 71, 15, 66, 23, 8]])


def padded() -> dict[str, torch.Tensor]:
    ids = torch.stack([PROMPT[0], PROMPT[0].flip(0), PROMPT[0].roll(3)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :11] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def cases() -> list[Any]:
    """Every family and cache; in `make test` those that differ from one another."""
    soon = {("llama", "dynamic"), ("mistral", "dynamic"), ("gemma2", "static"), ("gpt_oss", "dynamic")}
    return [
        pytest.param(family, cache, marks=[] if (family, cache) in soon else [pytest.mark.prove])
        for family in FAMILIES
        for cache in ("dynamic", "static")
    ]


@pytest.mark.parametrize(("family", "cache"), cases())
def test_tokens_are_those_of_transformers(family: str, cache: str, pair: Pair) -> None:
    ours, theirs = pair(family)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    for inputs in ({"input_ids": PROMPT}, padded()):
        assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_padded_batch(family: str, pair: Pair) -> None:
    ours, theirs = pair(family)
    for flip in (False, True):  # padding on the left, then on the right
        inputs = {name: value.flip(1) if flip else value for name, value in padded().items()}
        with torch.no_grad():
            mine, want = ours(**inputs).logits, theirs(**inputs).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(mine[real], want[real], rtol=1e-4, atol=1e-4)
        assert mine.isfinite().all()


def test_chunked_prefill_continues_a_cache(pair: Pair) -> None:
    ours, theirs = pair("mistral")
    with torch.no_grad():
        whole = theirs(PROMPT).logits
        cache = None
        parts = []
        for piece in PROMPT.split([5, 1, 8], dim=1):
            done = ours(piece, past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            parts.append(done.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_beam_is_reordered(pair: Pair) -> None:
    ours, theirs = pair("llama")
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(ours.generate(**padded(), **options), theirs.generate(**padded(), **options))


def test_half_precision(pair: Pair) -> None:
    ours, theirs = (model.bfloat16() for model in pair("llama"))
    with torch.no_grad():
        mine, want = ours(**padded()).logits, theirs(**padded()).logits
    real = padded()["attention_mask"].bool()
    torch.testing.assert_close(mine[real], want[real], rtol=0.1, atol=0.35)


class TestRefusals:
    def test_training(self, pair: Pair) -> None:
        ours, _ = pair("llama")
        with pytest.raises(ValueError, match="no backward pass"):
            ours(PROMPT)

    def test_dropout(self, pair: Pair) -> None:
        ours, _ = pair("llama")
        ours.train()
        for layer in ours.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with torch.no_grad(), pytest.raises(ValueError, match="dropout"):
            ours(PROMPT)

    def test_a_mask_of_ones_own(self, pair: Pair) -> None:
        ours, _ = pair("llama")
        with torch.no_grad(), pytest.raises(ValueError, match="custom attention mask"):
            ours(PROMPT, attention_mask=torch.zeros(1, 1, 14, 14))

    def test_a_hole_in_the_mask(self, pair: Pair) -> None:
        ours, _ = pair("llama")
        mask = torch.ones_like(PROMPT)
        mask[0, 4] = 0
        with torch.no_grad(), pytest.raises(ValueError, match="not in the middle"):
            ours(PROMPT, attention_mask=mask)

    def test_packed_sequences(self, pair: Pair) -> None:
        ours, _ = pair("llama")
        positions = torch.arange(14)[None] % 7
        with torch.no_grad(), pytest.raises(ValueError, match="packed"):
            ours(PROMPT, position_ids=positions, use_cache=False)

    def test_a_model_that_reads_the_mask_itself(self, pair: Pair) -> None:
        mask = dougong_mask(1, 3, 3)
        assert mask.shape == (1, 1, 3, 3)
        with pytest.raises(ValueError, match="holds lengths, not values"):
            mask + 1

    def test_an_overlay_of_the_models_own(self, pair: Pair) -> None:
        from transformers.masking_utils import create_causal_mask

        ours, _ = pair("llama")
        mask = create_causal_mask(
            ours.config, torch.zeros(1, 6, 64), None, None, or_mask_function=lambda b, h, q, k: k >= 0
        )
        with pytest.raises(ValueError, match="custom mask functions"):
            mask.rows()
