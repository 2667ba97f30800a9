"""The packaged model: equal to transformers on the unpacked folder, and still itself in 4 bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import PagedModel

from dougong.hal import Backend
from dougong.models import LoadedModel, ModelConfig, WeightSpec, get_tokenizer, read_config, resolve_model
from dougong.models.loading.gguf import GGUFWeights

QUESTION = "What is the capital of France?"
PROMPTS = ["def fibonacci(n):\n"]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(resolve_model("smollm2-135m").folder)


@pytest.fixture(scope="module")
def theirs(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(paged: PagedModel, prompt: list[int], count: int, sequence: int = 0) -> list[int]:
    got = [int(paged.step([(sequence, prompt)])[0][-1].argmax())]
    while len(got) < count:
        got.append(int(paged.step([(sequence, got[-1:])])[0][-1].argmax()))
    return got


def test_logits_and_greedy_tokens_equal_transformers(
    folder: str, theirs: Any, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    tokenizer = get_tokenizer(folder)
    ours = load("smollm2-135m", max_model_len=256)
    assert str(ours.path) == folder
    chat = [{"role": "user", "content": QUESTION}]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]]
    prompts += [tokenizer(text)["input_ids"] for text in PROMPTS]
    for sequence, prompt in enumerate(prompts):
        paged = PagedModel(ours.model, backend, sequences=2, block_size=16)
        with torch.inference_mode():
            want = theirs(input_ids=torch.tensor([prompt])).logits[0]
            tokens = theirs.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
            )[0, len(prompt) :].tolist()
        got = paged.run(prompt, (16, 5), sequence)
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
        again = PagedModel(ours.model, backend, sequences=1, block_size=16)
        assert greedy(again, prompt, 6) == tokens


def test_four_bits_still_answer(folder: str, backend: Backend, load: Callable[..., LoadedModel]) -> None:
    tokenizer = get_tokenizer(folder)
    ours = load("smollm2-135m", quantization="int4", max_model_len=256)
    layer: Any = ours.model.layers[7]  # type: ignore[index]
    gguf = resolve_model("smollm2-135m").gguf
    assert gguf is not None
    down = GGUFWeights(gguf).read_quantized(WeightSpec("model.layers.7.mlp.down_proj.weight", (576, 1536)))
    assert down is not None
    assert torch.equal(layer.feed_forward.down.packed.q, down.q)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    paged = PagedModel(ours.model, backend, block_size=16)
    assert "Paris" in tokenizer.decode(greedy(paged, prompt["input_ids"], 8))


def test_a_second_start_needs_no_config_classes(folder: str) -> None:
    """transformers' config and modelling code takes seconds to import; the unpacked model is found without it."""
    code = (
        "import sys; from pathlib import Path; from dougong.models import get_tokenizer, read_config;"
        f"read_config(Path({folder!r})); assert 'transformers' not in sys.modules;"
        f"get_tokenizer({folder!r}); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_short_way_to_a_config_gives_what_transformers_gives(folder: str) -> None:
    from transformers import AutoConfig

    ours, theirs = read_config(Path(folder)), ModelConfig.from_transformers(AutoConfig.from_pretrained(folder))
    assert ours == theirs
    assert (ours.num_layers, ours.num_kv_heads, ours.max_positions, ours.dtype) == (30, 3, 8192, torch.bfloat16)
