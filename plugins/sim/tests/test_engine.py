"""The whole engine on a device that is not the CPU: eager, with graphs that need updates, and short of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dougong_sim
from dougong import LLM, SamplingParams
from dougong.errors import CacheMemoryError
from dougong.plugins import load_plugins

PROMPTS = [[5, 7, 9, 3], list(range(3, 40)), [11]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        initializer_range=0.3,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def engine(model: Path, **options: Any) -> LLM:
    settings: dict[str, Any] = {
        "backend": "sim", "dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 4, "max_model_len": 128,
        "num_kv_blocks": 64, "plugins": load_plugins(entries=(), extra=[("sim", dougong_sim)]),
    }  # fmt: skip
    return LLM(str(model), **(settings | options))


def tokens(llm: LLM) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """transformers' greedy tokens, on the CPU."""
    from transformers import LlamaForCausalLM

    host = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [host.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {}, {"overlap": False}, {"num_kv_blocks": 8}], ids=str)
def test_greedy_tokens(model: Path, expected: list[list[int]], options: dict[str, Any]) -> None:
    assert tokens(engine(model, **options)) == expected


def test_memory_is_given_back(model: Path) -> None:
    import gc

    llm = engine(model)
    tokens(llm)
    del llm
    gc.collect()
    torch.sim.synchronize()
    assert torch.sim.memory_allocated() < 1 << 20


@pytest.fixture
def little() -> Iterator[None]:
    """A device that has 4 MiB more than is used now."""
    before = torch.sim.mem_get_info()[1]
    torch.sim.set_memory_limit(torch.sim.memory_reserved() + (4 << 20))
    yield
    torch.sim.set_memory_limit(before)


@pytest.mark.usefixtures("little")
def test_too_little_memory_for_the_cache_says_how_much_fits(model: Path, expected: list[list[int]]) -> None:
    with pytest.raises(CacheMemoryError, match="were asked for") as caught:
        engine(model, num_kv_blocks=100_000)
    found = re.search(r"About (\d+) blocks fit: lower num_kv_blocks", str(caught.value))
    assert found is not None
    fits = int(found[1])
    assert 8 < fits < 100_000
    # Half of that: steps need room too, and under pytest the error's frames still hold the first try's weights.
    assert tokens(engine(model, num_kv_blocks=fits // 2)) == expected


@pytest.mark.usefixtures("little")
def test_too_little_memory_for_one_request_of_the_length_asked_for(model: Path) -> None:
    with pytest.raises(CacheMemoryError, match=r"(enough for \d+ tokens|does not fit).*(max_model_len|max_num)"):
        engine(model, num_kv_blocks=None, memory_utilization=0.01, max_model_len=256)
