"""Small models with a tokenizer of bytes, transformers' answers, and an engine that must be left clean."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dougong import LLM, SamplingParams
from dougong.engine import Engine
from dougong.plugins import load_plugins

#: The backend that the tests run on. tests/end_to_end/test_on_sim.py runs some of them again on another.
BACKEND = os.environ.get("DOUGONG_E2E_BACKEND", "cpu")

#: One id per byte, then the end token.
VOCAB, EOS = 260, 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}

#: name -> (transformers' config class, values). Gemma 3 mixes windows of 24 tokens with full attention.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 2}),
    "gemma": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
    ),
}

CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_tiny(name: str, folder: Path) -> Path:
    """A random model in float32 and its tokenizer."""
    import transformers

    kind, values = TINY[name]
    config = getattr(transformers, kind)(**(_COMMON | values))
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes: no text that it cannot write, and characters of several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def prompts(count: int = 10, seed: int = 3) -> list[list[int]]:
    """Prompts of varied lengths; some share a long beginning, one is a single token."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    shared = some(40)
    found = [some(1), some(16), some(33), shared + some(5), shared + some(21), shared]
    while len(found) < count:
        found.append(some(int(torch.randint(2, 90, (1,), generator=generator))))
    return found[:count]


class Reference:
    """transformers' model of a folder, in float32 on the host; greedy answers are kept."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._greedy: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """``count`` tokens; an end token does not end it."""
        key = (tuple(prompt), count)
        if key not in self._greedy:
            self._greedy[key] = self.generate(prompt, max_new_tokens=count)
        return self._greedy[key]

    def greedy_near(self, prompt: Sequence[int], guess: Sequence[int]) -> list[int]:
        """The same as ``greedy(prompt, len(guess))``, at the cost of one forward where the guess is right.

        If every token of the guess is the likeliest after the prompt and the tokens before it, then greedy search
        gives just these tokens.
        """
        likeliest = self.logprobs([*prompt, *guess])[len(prompt) - 1 : -1].argmax(-1).tolist()
        return likeliest if likeliest == list(guess) else self.greedy(prompt, len(guess))

    def generate(self, prompt: Sequence[int], **options: Any) -> list[int]:
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found: list[int] = out[0, len(prompt) :].tolist()
        return found

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), V] float32: at position i, of the token after it."""
        logits: torch.Tensor = self.model(torch.tensor([list(ids)])).logits[0]
        return logits.float().log_softmax(-1)


def make_llm(folder: Path | str, **options: Any) -> LLM:
    """An LLM of a small model, in float32. No plugin but the backend's takes part."""
    values: dict[str, Any] = {
        "backend": BACKEND, "dtype": "float32", "max_num_seqs": 8, "max_model_len": 256, "num_kv_blocks": 160,
        "warm_up": False, **options,
    }  # fmt: skip
    return LLM(str(folder), plugins=load_plugins(BACKEND), **values)


@contextmanager
def opened(folder: Path | str, **options: Any) -> Iterator[LLM]:
    """The same, closed at the end and looked through for leaks."""
    llm = make_llm(folder, **options)
    try:
        yield llm
        check_clean(llm.engine)
    finally:
        llm.close()


def settle(engine: Engine) -> None:
    """Run until nothing is left to do."""
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not come to rest")


def check_clean(engine: Engine) -> None:
    """No request, step or block is left, and the books agree."""
    settle(engine)
    engine.scheduler.check_integrity()
    engine.kv.check_integrity(())
    assert not engine._groups and not engine._completions and not engine._flights
    assert not engine.scheduler.has_work and engine.scheduler.num_in_flight == 0
    for group in engine.kv.groups:
        assert group.pool.num_free == group.pool.num_usable


def greedy(count: int = 24, **options: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**(values | options))


def tokens_of(llm: LLM, items: Sequence[Sequence[int]], count: int = 24) -> list[list[int]]:
    outputs = llm.generate([list(item) for item in items], greedy(count), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a model's config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
