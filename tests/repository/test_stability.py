"""A plugin that was built against the contract goes on working: as a wheel, installed beside the core of today."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dougong.plugins import ABI, hookspecs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("abi_plugin")

SCRIPT = """
import json, sys, torch
import old_connector, old_kernels, old_plugin
from dougong import LLM, SamplingParams

def run(prompts, **options):
    llm = LLM(model=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, backend=sys.argv[2], dtype="float32",
              max_model_len=64, num_kv_blocks=32, block_size=4, **options)
    params = SamplingParams(max_tokens=6, temperature=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    kernel = [llm.engine.runner.choices[op].spec.provider for op in ("attention", "silu_mul")]
    llm.close()
    return [list(one.outputs[0].token_ids) for one in outputs], outputs, kernel

prompts = [{"prompt_token_ids": ids} for ids in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 8, 9])]
tokens, _, kernel = run(prompts)
_, sent, _ = run(prompts, kv_connector="old", kv_role="producer")
asked = [{**prompt, "kv_transfer_params": one.kv_transfer_params} for prompt, one in zip(prompts, sent)]
again, taken, _ = run(asked, kv_connector="old", kv_role="consumer")
print(json.dumps({
    "tokens": tokens, "again": again, "kernel": kernel, "calls": old_kernels.CALLS, "steps": len(old_plugin.STEPS),
    "cached": [one.num_cached_tokens for one in taken], "connector": old_connector.CALLS,
}))
"""


def old_plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("old_plugin", SOURCE / "old_plugin.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_old_plugin_knows_every_hook_and_no_argument_that_is_gone() -> None:
    plugin = old_plugin()
    for name, spec in inspect.getmembers(hookspecs, inspect.isfunction):
        if not name.startswith("dougong_") or not hasattr(plugin, name):
            continue
        known = set(inspect.signature(spec).parameters)
        assert set(inspect.signature(getattr(plugin, name)).parameters) <= known, f"{name} lost an argument"
    gone = [name for name in vars(plugin) if name.startswith("dougong_") and not hasattr(hookspecs, name)]
    assert not gone, f"hooks were taken away: {gone}"


def test_the_old_plugin_is_of_this_major() -> None:
    major, minor = old_plugin().ABI
    assert major == ABI[0], "a new major number: write abi_plugin anew for it"
    assert minor <= ABI[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's wheel, built and unpacked into a folder of its own."""
    base = tmp_path_factory.mktemp("old-plugin")
    shutil.copytree(SOURCE, base / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(base), str(base / "source")],
        [*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(base / "site"),
         str(base / "old_plugin-1.0.0-py3-none-any.whl")],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return base / "site"


def run(site: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.prove
def test_a_wheel_of_old_goes_on_working(installed: Path, tmp_path: Path) -> None:
    """Its backend is found and opened, its attention chosen by priority and its op by its hook, its observer hears of
    steps, its KV connector carries a prompt from one engine to another, its command is there; tokens are those of the
    CPU backend."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    answers = {}
    for backend in ("old", "cpu"):
        answers[backend] = json.loads(run(installed, "-c", SCRIPT, str(tmp_path), backend).splitlines()[-1])
    old = answers["old"]
    assert old["kernel"] == ["old", "old"]
    assert old["calls"]["plan"] > 0 and old["calls"]["run"] > 0
    assert old["steps"] > 0
    assert old["tokens"] == old["again"] == answers["cpu"]["tokens"]
    assert old["cached"] == [8, 0]
    assert {"store", "finished", "prefetch", "load", "close"} <= set(old["connector"])
    assert "old plugin here" in run(installed, "-m", "dougong", "old-plugin")
