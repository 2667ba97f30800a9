"""`dougong bench attention|step|offline`: a JSON line each and a plot; what cannot be drawn is said before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e_harness import BACKEND

from dougong.cli.bench import report
from tests.cli.shell import Command


@pytest.fixture
def arguments(llama: Path) -> dict[str, list[str]]:
    """A small run of each."""
    model = ["--model", str(llama), "--dtype", "float32", "--backend", BACKEND, "--set", "num_kv_blocks=64"]
    return {
        "attention": ["--decode", "2:40,1:70", "--prefill", "1:40", "--heads", "4/2", "--dtype", "float32",
                      "--repeats", "2", "--backend", BACKEND],
        "step": ["--rows", "2", "--prompt", "5", "--tokens", "6", *model],
        "offline": ["--workloads", "2:5:4,1:7:3", "--repeats", "2", "--shared-prefix-len", "2", *model],
    }  # fmt: skip


def lines(ended: Any) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def check(found: list[dict[str, Any]], bench: str, plot: Path) -> None:
    for line in found:
        assert line["bench"] == bench and line["device"]["backend"] == BACKEND and line["versions"]["torch"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_attention(command: Command, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    plot = tmp_path / "a.png"
    found = lines(command("bench", "attention", *arguments["attention"], "--plot", str(plot)))
    check(found, "attention", plot)
    shapes = [(line["workload"]["kind"], line["workload"]["rows"], line["workload"]["context"]) for line in found]
    assert shapes == [("decode", 2, 40), ("decode", 1, 70), ("prefill", 1, 40)]
    for line in found:
        result = line["result"]
        assert result["relative_error"] < 1e-5 and result["us"] > 0 and result["share_of_ceiling"] > 0
        assert result["provider"] and set(result["ceilings"]) == {"copy_GB_s", "read_GB_s", "product_TFLOP_s"}


def test_step(command: Command, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    plot = tmp_path / "s.png"
    found = lines(command("bench", "step", *arguments["step"], "--plot", str(plot)))
    check(found, "step", plot)
    (line,) = found
    assert set(line["result"]["us_per_step"]) == {"schedule", "launch", "wait", "commit"}
    assert line["result"]["steps"] >= 6 and line["workload"]["rows"] == 2


def test_offline(command: Command, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    plot = tmp_path / "o.png"
    found = lines(command("bench", "offline", *arguments["offline"], "--plot", str(plot)))
    check(found, "offline", plot)
    assert [(line["workload"]["num_prompts"], line["workload"]["output_len"]) for line in found] == [(2, 4), (1, 3)]
    for line in found:
        result = line["result"]
        made = line["workload"]["num_prompts"] * line["workload"]["output_len"]
        assert result["output_tok_s"] == pytest.approx(made / min(result["wall_s_all"]), rel=0.05)
        assert len(result["wall_s_all"]) == 2 and result["ttft_ms"]["p99"] > 0


@pytest.mark.parametrize("bench", ["attention", "step", "offline"])
def test_a_plot_that_cannot_be_drawn_stops_the_run_before_it_begins(
    bench: str, command: Command, arguments: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, words in (
        (tmp_path / "nowhere" / "x.png", "there is no folder"),
        (tmp_path / "x.jpg", "expected a file whose name ends in .png"),
    ):
        ended = command("bench", bench, *arguments[bench], "--plot", str(path))
        assert ended.code == 1 and words in ended.err and not ended.out
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    ended = command("bench", bench, *arguments[bench], "--plot", str(tmp_path / "x.png"))
    assert ended.code == 1 and "pip install 'dougong[plots]'" in ended.err and not ended.out


def test_attention_names_the_providers_when_the_one_asked_for_is_not_there(command: Command) -> None:
    ended = command("bench", "attention", "--backend", BACKEND, "--provider", "warp", "--dtype", "float32")
    assert ended.code == 1 and "warp" in ended.err and "torch reference" in ended.err
