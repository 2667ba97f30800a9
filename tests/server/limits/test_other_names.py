"""vLLM's options at `dougong serve`: what means the same works, what does not is refused with what does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dougong.cli.app import build_app
from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.server.config import ServerConfig, option_types, resolve_config
from dougong.server.other_names import OTHER_NAMES, SHORT_FLAGS


def serve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ServerConfig:
    """What `dougong serve ARGUMENTS` would serve."""
    served: list[ServerConfig] = []
    monkeypatch.setattr("dougong.server.run.serve", served.append)
    done = CliRunner().invoke(build_app(), ["serve", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return served[0]


def test_a_command_line_of_vllms_serves_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    config = serve(
        monkeypatch, "--model", "m", "--served-model-name", "a", "--max_model_len", "4096", "-tp", "2", "-q", "int8",
        "--gpu-memory-utilization", "0.5", "--num-gpu-blocks-override", "64", "--no-async-scheduling",
        "--dtype", "half", "--cudagraph-capture-sizes", "1,2",
        "--enable-auto-tool-choice", "--tool-call-parser", "llama3_json", "--reasoning-parser", "deepseek_r1",
        "--generation-config", "vllm", "--allowed-origins", '["https://a", "https://b"]',
        "--uvicorn-log-level", "warning", "--disable-log-requests", "--disable-fastapi-docs", "--swap-space", "0",
        "--disable-log-stats", "--pipeline-parallel-size", "1", "--ssl-certfile", str(pem), "--ssl-keyfile", str(pem),
    )  # fmt: skip
    assert config == ServerConfig(
        engine=EngineConfig(
            model="m", max_model_len=4096, tensor_parallel_size=2, quantization="int8", memory_utilization=0.5,
            num_kv_blocks=64, overlap=False, dtype="float16", graph_sizes=(1, 2),
        ),
        served_model_name=("a",), tool_call_parser="llama3", reasoning_parser="think-inside", generation_config="none",
        cors_origins=("https://a", "https://b"), log_level="warning", log_requests=False, docs=False, metrics=False,
        tls_cert=str(pem), tls_key=str(pem),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speculative-config", "{}"], "no speculative decoding"),
        (
            ["--pipeline-parallel-size", "2"],
            "--pipeline-parallel-size 2 is an option of vLLM's.*--tensor-parallel-size",
        ),
        (["--kv-transfer-config", "{}"], "--kv-connector, --kv-role"),
        (["--enable-lora"], "--enable-lora is an option of vLLM's.*merge them"),
        (["--no-enable-auto-tool-choice"], "--tool-call-parser none"),
        (["m", "--model", "n"], "give one of them"),
        (["--memory-utilization", "0.5", "--gpu-memory-utilization", "0.5"], "memory_utilization is given twice"),
        (["--tool-call-parser", "none", "--cors-origins", "[1"], "expected a list"),
    ],
)
def test_what_means_nothing_here_is_refused_with_what_does(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CliRunner().invoke(build_app(), ["serve", *arguments], catch_exceptions=False)


def test_the_file_and_the_environment_know_the_names_too(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "gpu-memory-utilization: 0.7\nallowed-origins: [x]\nenable-lora: false\ndisable-log-requests: true\n"
    )
    config = resolve_config({}, file=file, environ={"DOUGONG_GPU_MEMORY_UTILIZATION": "0.6"})
    assert (config.engine.memory_utilization, config.cors_origins, config.log_requests) == (0.6, ("x",), False)
    with pytest.raises(ConfigError, match="DOUGONG_GPU_MEMORY_UTILIZATION: memory_utilization='x': expected a number"):
        resolve_config({}, environ={"DOUGONG_GPU_MEMORY_UTILIZATION": "x"})
    file.write_text("enable_lora: true")
    with pytest.raises(ConfigError, match=r"config file .*enable-lora is an option"):
        resolve_config({}, file=file, environ={})


def test_every_name_is_shown_in_the_handbook_and_leads_to_an_option() -> None:
    types = option_types()
    page = (Path(__file__).resolve().parents[3] / "docs" / "server-options.md").read_text(encoding="utf-8")
    for name, other in OTHER_NAMES.items():
        assert name not in types, f"{name} is an option here"
        assert (other.ours in types) if other.ours is not None else other.instead, name
        assert f"`--{name.replace('_', '-')}`" in page
    assert set(SHORT_FLAGS) <= set(types)


def test_lists_may_be_json_wherever_they_stand() -> None:
    given: list[Any] = ["a", "a,b", ["a", "b"], '["a", "b"]', ['["a", "b"]']]
    found = [resolve_config({"served_model_name": one}, environ={}).served_model_name for one in given]
    assert found == [("a",), *[("a", "b")] * 4]
    assert resolve_config({}, environ={"DOUGONG_KERNEL_PROVIDERS": json.dumps({"x": "y"})}).engine.kernel_providers
