"""The whole engine through this backend on the twin, with each library, with and without graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dougong_xpu
from dougong import LLM, SamplingParams
from dougong.errors import DougongError
from dougong.plugins import load_plugins
from dougong_xpu.twin import plugin

PROMPTS = [[5, 7, 9, 3], list(range(3, 40)), [11]]
PROVIDERS = ("vllm-xpu-kernels", "sgl-kernel-xpu", "intel-extension-for-pytorch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=100, initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokens(model: Path, provider: str, **options: Any) -> tuple[list[list[int]], Any]:
    plugins = load_plugins(entries=(), extra=[("xpu", dougong_xpu), ("twin", plugin)])
    chosen: dict[str, Any] = {
        "backend": "xpu-twin", "dtype": "float16", "skip_tokenizer_init": True, "max_num_seqs": 4,
        "max_model_len": 128, "num_kv_blocks": 12, "plugins": plugins, "attention_provider": provider,
    }  # fmt: skip
    llm = LLM(str(model), **(chosen | options))
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], llm.engine.runner


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """transformers' own greedy tokens on the CPU."""
    from transformers import LlamaForCausalLM

    host = LlamaForCausalLM.from_pretrained(model, dtype=torch.float16)
    with torch.inference_mode():
        return [
            host.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, len(prompt) :]
            .tolist()
            for prompt in PROMPTS
        ]  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def test_greedy_tokens(model: Path, expected: list[list[int]], provider: str) -> None:
    found, runner = tokens(model, provider)
    assert found == expected
    assert runner.choices["attention"].spec.provider == provider
    graphs = runner._parts.graphs
    if provider == "intel-extension-for-pytorch":
        assert graphs is None or not graphs.captured
    else:
        assert graphs.failed == "" and any(entry.ready for entry in graphs.captured.values())


def test_without_graphs(model: Path, expected: list[list[int]]) -> None:
    assert tokens(model, "vllm-xpu-kernels", enforce_eager=True)[0] == expected


@pytest.mark.parametrize(
    ("provider", "options", "words"),
    [
        ("vllm-xpu-kernels", dict(block_size=16), "(?s)block_size=16.*other sizes.*nearest is 64"),
        ("vllm-xpu-kernels", dict(dtype="float32"), "float32"),
        ("vllm-xpu-kernels", dict(kv_cache_dtype="int8"), "kv_int8"),
        ("vllm-xpu-kernels", dict(device_index=7), "device_index=7"),
        ("no-such-library", {}, "no-such-library"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(
    model: Path, provider: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DougongError, match=words):
        tokens(model, provider, **options)


@pytest.mark.prove
@pytest.mark.parametrize("library", ["vllm", "sgl", "ipex"])
def test_conformance_smoke(library: str, tmp_path: Path) -> None:
    manifest = Path(dougong_xpu.__file__).parent / "twin" / f"{library}.toml"
    command = [
        sys.executable, "-m", "dougong", "compat", "run", "--backend", "xpu-twin",
        "--plugin", "dougong_xpu.twin.plugin", "--profile", "smoke", "--manifest", str(manifest),
        "--out", str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "DOUGONG_XPU_TWIN": library}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "CONFORMANT"
