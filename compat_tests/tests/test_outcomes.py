"""Bad plugins through the whole command: each is an outcome in report.json, never a broken run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dougong_compat.report.build import schema
from dougong_compat.report.schema_check import violations
from dougong_compat.report.verify import faults

BAD = "dougong_compat.selftest.cheats"
CASE = "L1/attention/mandatory/decode-h4k1-d64"
#: Asked before and after: what a bad case leaves behind must not be laid at another's door.
DEVICE = "L0/device/dtypes"
GENEROUS = """
[capabilities]
dtypes = ["float32"]
layouts = ["nhd"]
block_sizes = "any"
head_dims = "any"
ratios = "any"
features = ["softcap", "window", "lse", "sinks"]
graphs = true
kv_manager = true
"""


def run(folder: Path, backend: str, *cases: str, plugin: str = BAD, code: int = 2, **options: str) -> dict[str, Any]:
    """The report of a selection (so never above INVALID), and that its four files hold together."""
    command = [sys.executable, "-m", "dougong_compat", "run", "--backend", backend, "--out", str(folder)]
    command += [word for case in cases for word in ("--only", case)] + (["--plugin", plugin] if plugin else [])
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr[-2000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert violations(report, schema()) == [] and faults(report) == []
    assert {path.name for path in folder.iterdir()} >= {"report.json", "junit.xml", "report.html", "badge.json"}
    assert "Traceback" not in done.stderr
    return report


def outcomes(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {case["id"]: (case["outcome"], case.get("message", "")) for case in report["cases"]}


@pytest.mark.prove
@pytest.mark.parametrize(
    ("backend", "outcome", "part"),
    [
        ("bad-segfault", "CRASH", "SIGSEGV"),
        ("bad-hang", "TIMEOUT", "did not answer in time"),
        ("bad-prints", "CRASH", "no answer"),
        ("bad-lost", "FAIL", "illegal address"),
        ("cheat-raises", "FAIL", "declared, and raised NotImplementedError"),
        ("cheat-skips", "FAIL", "mandatory, and refused: "),
    ],
)
def test_a_bad_backend_is_an_outcome(backend: str, outcome: str, part: str, tmp_path: Path) -> None:
    report = run(tmp_path, backend, CASE, DEVICE, "L2/manager/window/n4-w5", timeout="4")
    found = outcomes(report)
    assert found[CASE][0] == outcome and part in found[CASE][1]
    assert [found[name][0] for name in (DEVICE, "L2/manager/window/n4-w5")] == ["PASS", "PASS"], "the rest goes on"
    assert report["worker_restarts"] == (0 if backend.startswith("cheat") else 1), "a broken process answers no more"
    row = next(case for case in report["cases"] if case["id"] == CASE)
    assert row["reproduce"].startswith(f"dougong compat repro --backend {backend}")


@pytest.mark.prove
def test_a_leak_is_an_outcome(tmp_path: Path) -> None:
    case = "L4/stress/leak/decode-h8k2-d64"
    report = run(tmp_path, "bad-leak", case, CASE, profile="full")
    found = outcomes(report)
    assert found[case][0] == "FAIL" and "more tensors" in found[case][1] and found[CASE][0] == "PASS"


@pytest.mark.prove
def test_a_lying_manifest_is_an_outcome(tmp_path: Path) -> None:
    """It declares what the kernel drops (wrong numbers), and what the device has not got (refused)."""
    (tmp_path / "compat.toml").write_text(GENEROUS)
    manifest = str(tmp_path / "compat.toml")
    dropped = "L1/attention/feature/softcap-decode-h6k2-d64-cap20.0"
    report = run(tmp_path / "a", "cheat-lies", dropped, CASE, manifest=manifest)
    found = outcomes(report)
    assert found[dropped][0] == "FAIL" and "times the bound" in found[dropped][1]
    assert found[CASE][0] == "PASS" and report["manifest"]["source"] == manifest
    report = run(tmp_path / "b", "reference", "L4/replay/decode-tables-*", plugin="", manifest=manifest, profile="full")
    found = outcomes(report)
    assert len(found) >= 4 and all(
        word == "FAIL" and why.startswith("declared, and refused") for word, why in found.values()
    ), found


@pytest.mark.prove
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("def dougong_backends(:\n", "SyntaxError"),
        ("import ctypes\nctypes.string_at(0)\n", "SIGSEGV"),
        ("import os\nos._exit(3)\n", "status 3"),
        ("raise RuntimeError('no driver')\n", "no driver"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_gets_a_report(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = run(tmp_path / "report", "brokendev", CASE, plugin="broken_plugin", code=3)
    assert report["verdict"] == "INVALID" and part in report["reasons"][0], report["reasons"]
    assert report["totals"]["cases"] == 0 and report["not_run"] == [CASE]


@pytest.mark.prove
def test_an_unknown_backend_gets_a_report(tmp_path: Path) -> None:
    report = run(tmp_path, "nobody", CASE, plugin="", code=3)
    assert report["verdict"] == "INVALID" and "nobody" in report["reasons"][0] and report["not_run"] == [CASE]


@pytest.mark.prove
def test_a_budget_is_kept_and_the_rest_is_named(tmp_path: Path) -> None:
    """A backend that never answers, one case a minute: after four seconds there is a report."""
    report = run(tmp_path, "bad-hang", "L1/attention/mandatory", budget="4", timeout="60", jobs="2")
    assert report["cases"] == [] and len(report["not_run"]) > 60 and report["seconds"] < 60
    assert "the budget of 4 s was spent" in " ".join(report["reasons"])
