"""The whole engine through this backend on the twin: eager, with graphs, and short of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dougong_ascend
from dougong import LLM, SamplingParams
from dougong.errors import DougongError
from dougong.plugins import load_plugins
from dougong_ascend.twin import plugin
from dougong_ascend.twin.settings import settings

PROMPTS = [[5, 7, 9, 3], list(range(3, 40)), [11]]


def make(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(shape | changes))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tiny-llama"))


def engine(model: Path | str, backend: str = "ascend-twin", **options: Any) -> LLM:
    import dougong_cpu

    plugins = load_plugins(entries=(), extra=[("ascend", dougong_ascend), ("twin", plugin), ("cpu", dougong_cpu)])
    chosen: dict[str, Any] = {
        "backend": backend, "dtype": "float16", "skip_tokenizer_init": True, "max_num_seqs": 4, "max_model_len": 128,
        "num_kv_blocks": 24, "block_size": 16, "plugins": plugins,
    }  # fmt: skip
    return LLM(str(model), **(chosen | options))


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS, count: int = 8) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def judged(host: Any, exact: Any, prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """(tokens that are a choice of the reference, tokens that are not its first although its top two logits lie more
    than 4 ulp apart): each token judged behind the answer's own tokens before it.

    ``host`` is transformers' model on the CPU in the engine's dtype, ``exact`` the same in float32. In bfloat16 a logit
    of 20 comes in steps of 0.125: in 2 to 3% of places two or three tokens share the highest, and each of them is an
    arg max. Where rounding alone put another token there, float32 says which one the model means.
    """
    with torch.inference_mode():
        logits, sums = (
            model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :] for model in (host, exact)
        )
    chosen = torch.tensor(answer)
    top = logits.topk(2)
    equal = logits.gather(1, chosen[:, None])[:, 0] == top.values[:, 0]
    ulp = torch.finfo(logits.dtype).eps * torch.exp2(top.values[:, 0].float().abs().log2().floor())
    clear = (top.values[:, 0] - top.values[:, 1]).float() > 4 * ulp
    return int((equal | (sums.argmax(1) == chosen)).sum()), int((clear & ~equal).sum())


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What this backend answers without graphs, judged by transformers' model on the CPU."""
    from transformers import LlamaForCausalLM

    host, exact = (LlamaForCausalLM.from_pretrained(model, dtype=dtype) for dtype in (torch.float16, torch.float32))
    answers = tokens(engine(model, enforce_eager=True))
    counts = [judged(host, exact, prompt, answer) for prompt, answer in zip(PROMPTS, answers)]
    assert sum(wrong for _, wrong in counts) == 0  # 24 tokens measure no rate: test_a_real_model does
    return answers


@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": False, "graph_sizes": [1, 4]}, {"num_kv_blocks": 8}, {"block_size": 128}],
    ids=str,
)
def test_greedy_tokens(model: Path, expected: list[list[int]], options: dict[str, Any]) -> None:
    assert tokens(engine(model, **options)) == expected


def test_on_310p(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "soc", "Ascend310P3")
    assert tokens(engine(model)) == tokens(engine(model, "cpu", enforce_eager=True))


def test_choices_and_captures(model: Path) -> None:
    llm = engine(model)
    runner = llm.engine.runner
    assert runner.choices["attention"].spec.provider == "npu fused infer attention"
    graphs = runner._parts.graphs
    assert graphs is not None and graphs.mixed == () and graphs.decode
    tokens(llm)
    assert graphs.failed == "" and any(entry.ready for entry in graphs.captured.values())


def test_captures_stay_within_the_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers and a chip that holds two captures of them: the smallest batch's and the largest one's."""
    monkeypatch.setattr("dougong_ascend.graphs._CAPTURE_STREAMS", 6)
    graphs = engine(model, max_num_seqs=8).engine.runner._parts.graphs
    assert graphs is not None and graphs.failed == ""
    assert sorted(key.rows for key, entry in graphs.captured.items() if entry.ready) == [1, 8]


def test_a_shared_prefix_keeps_to_the_operator_s_count_of_blocks(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share blocks name more of them together than the cache has: without graphs such calls are cut."""
    monkeypatch.setattr(settings, "own_blocks", True)
    long = list(range(3, 99))
    llm = engine(model, enforce_eager=True, num_kv_blocks=16)
    first = tokens(llm, [long])
    assert tokens(llm, [[*long], [*long], [*long]]) == first * 3
    assert llm.engine.runner._parts.context.caches[0].num_blocks < 3 * -(-len(long) // 16)


NAMED = {"attention_provider": "npu fused infer attention"}


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ({}, {"block_size": 24}, r"(?s)block_size=24.*take other sizes.*nearest"),
        ({}, {"dtype": "float32"}, "dtype='float32'.*bfloat16, float16"),
        ({}, {"kv_cache_dtype": "fp8", **NAMED}, "lacks kv_fp8_e4m3"),
        ({"head_dim": 24}, NAMED, "head_dim=24: multiples of 16 up to 512 .nearest: head_dim=32"),
        (
            {"num_attention_heads": 66, "num_key_value_heads": 1, "hidden_size": 1056},
            NAMED,
            "66 query heads per kv head: at most 64",
        ),
        ({}, {"device_index": 7}, "device_index=7 was asked for; torch_npu sees"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_the_first_step(
    tmp_path: Path, shape: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DougongError, match=words):
        engine(make(tmp_path, **shape), **options)


QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Write a line about the sea.", "Count to five.",
    "The history of the Roman Empire began", "def fibonacci(n):", "Once upon a time, there was a small dragon",
    "Water boils at", "The three laws of motion are", "To bake bread, first", "In 1969, the first",
    "A list of European countries:", "Dear Sir or Madam,", "SELECT name FROM", "The mitochondria is",
    "Q: What is 7 times 8?\nA:",
)  # fmt: skip


@pytest.mark.prove
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_real_model(dtype: str) -> None:
    """SmolLM2-135M's text through this backend is the CPU's, in the sense of the contract: no clear token differs, and
    98% are the reference's. 6 of 768 are not in bfloat16 where all is well (rounding in both engines): as many tokens
    keep the spread of their number, 2.5, well away from the bound of 15."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = engine(
        "smollm2-135m", dtype=dtype, skip_tokenizer_init=False, max_num_seqs=len(QUESTIONS), max_model_len=256,
        block_size=128, num_kv_blocks=40,
    )  # fmt: skip
    folder = llm.engine.runner.model_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [list(tokenizer(question).input_ids) for question in QUESTIONS]
    answers = tokens(llm, prompts, count=48)
    host, exact = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for kind in (getattr(torch, dtype), torch.float32)
    )
    counts = [judged(host, exact, prompt, answer) for prompt, answer in zip(prompts, answers)]
    total = sum(map(len, answers))
    assert sum(wrong for _, wrong in counts) == 0, counts
    assert sum(equal for equal, _ in counts) >= 0.98 * total, counts
