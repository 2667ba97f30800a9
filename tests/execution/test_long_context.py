"""benchmarks/long_context.py: it compares what it says, on the CPU's kernels, and can come out wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dougong.hal.reference.attention import ReferenceAttention

SMALL = ["--backend", "cpu", "--lengths", "90,9,20,30", "--tokens", "4", "--step-tokens", "32", "--layers", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that is read without transformers, whose import would be most of these tests' time."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 97, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "long_context.py"
    spec = importlib.util.spec_from_file_location("long_context", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["long_context"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["long_context"]


def test_the_kernels_give_the_references_tokens(script: Any, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(model), *SMALL]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["workload"]["dtype"] for line in lines] == ["bfloat16", "float32"]
    for line in lines:
        found = line["result"]
        assert found["right"] and found["tokens"] == 16 and found["provider"] != "torch reference"
        assert found["rows_beside_the_long_one"] == 3, "the long request never decoded beside all the others"
    assert lines[1]["result"]["tokens_equal"] == 16


def test_attention_that_is_wrong_for_the_long_one_alone_is_found(
    script: Any, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ReferenceAttention.run

    def late(self: Any, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        plain(self, plan, layer, q, kv, out=out, lse=lse)
        if max(plan.kv_len) > 80:
            out.mul_(-50)

    monkeypatch.setattr(ReferenceAttention, "run", late)
    assert script.main([str(model), *SMALL, "--dtypes", "float32"]) == 1
    found = json.loads(capsys.readouterr().out)["result"]
    assert not found["right"] and {one["request"] for one in found["wrong"]} == {0}
    errors = found["logits_relative_error"]
    assert errors["long"] > 0.01 > 1e-4 > errors["short"]


def test_near_ties_are_forgiven_in_16_bits_only(script: Any) -> None:
    ulp = 2.0**-7 * 4  # of 5.0 in bfloat16
    truth = {(0, 0): torch.tensor([5.0, 5.0 - 4 * ulp, 0.0]), (1, 0): torch.tensor([0.0, 1.0, 5.0])}
    swapped = {(0, 0): torch.tensor([4.9, 5.0, 0.0]), (1, 0): truth[1, 0]}
    found = script.judge(truth, swapped, torch.bfloat16)
    assert found["right"] and (found["tokens_equal"], found["near_ties"]) == (1, 1)
    assert not script.judge(truth, swapped, torch.float32)["right"]
    far = {(0, 0): torch.tensor([5.0, 5.0 - 5 * ulp, 0.0]), (1, 0): truth[1, 0]}
    assert not script.judge(far, swapped, torch.bfloat16)["right"]
    third = {(0, 0): torch.tensor([4.0, 4.0, 5.0]), (1, 0): truth[1, 0]}  # a near tie, and another token altogether
    assert not script.judge(truth, third, torch.bfloat16)["right"]
    nan = {(0, 0): torch.full((3,), torch.nan), (1, 0): truth[1, 0]}
    assert not script.judge(truth, nan, torch.bfloat16)["right"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "90"], "expected two or more token counts"),
        (["--lengths", "90,9,10"], "9 and 10: lengths must lie at least --tokens"),
        (["--dtypes", "int8"], "'int8' is none of bfloat16, float32, float16"),
        (["--layers", "0"], "--layers 0: at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(
    script: Any, options: list[str], words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main([str(model), *options])
    assert caught.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
