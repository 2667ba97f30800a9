"""Vectors of prompts against transformers' hidden states, whatever the chunks, the cache, and what shares the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from e2e_harness import Reference, opened, prompts, save_tokenizer
from safetensors.torch import load_file

from dougong import SamplingParams
from dougong.errors import InvalidRequestError


def wanted(reference: Reference, ids: list[int], pooling: str) -> torch.Tensor:
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    picked: torch.Tensor = {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[pooling]
    return picked


@pytest.mark.parametrize("chunk", [16, 512])
def test_vectors_are_those_of_transformers(llama: Path, reference: Reference, chunk: int) -> None:
    texts = prompts(6)
    with opened(llama, max_num_batched_tokens=chunk, max_num_seqs=8) as llm:
        # Others that sample run in the same batches, and stay what they are.
        outputs = [llm.engine.add("free", texts[0], SamplingParams(max_tokens=6, temperature=0))]
        for pooling in ("last", "mean", "cls", "mean"):  # the second mean comes when everything is cached
            found = llm.embed(texts, pooling=pooling, normalize=False, use_tqdm=False)
            for ids, vector in zip(texts, found, strict=True):
                torch.testing.assert_close(torch.tensor(vector), wanted(reference, ids, pooling), rtol=1e-3, atol=1e-3)
        assert outputs[0].outputs[0].token_ids == reference.greedy(texts[0], 6)
        unit = llm.embed(texts[0], use_tqdm=False)[0]
        assert sum(value * value for value in unit) == pytest.approx(1)


def test_an_unknown_pooling_and_several_vectors_of_a_prompt_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'last', 'mean' or 'cls'"):
        SamplingParams(max_tokens=1, pooling="max")
    with pytest.raises(InvalidRequestError, match="max_tokens=1"):
        SamplingParams(max_tokens=5, pooling="last")


def test_a_checkpoint_without_its_head_gives_the_same_vectors_and_no_text(
    llama: Path, reference: Reference, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    reference.model.model.save_pretrained(folder)
    save_tokenizer(folder)
    assert not any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    with opened(folder) as llm:
        found = llm.embed([1, 2, 3], normalize=False, use_tqdm=False)[0]
        torch.testing.assert_close(torch.tensor(found), wanted(reference, [1, 2, 3], "last"), rtol=1e-3, atol=1e-3)
        with pytest.raises(InvalidRequestError, match="no head"):
            llm.generate([1, 2, 3], use_tqdm=False)
