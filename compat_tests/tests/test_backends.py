"""The suite on the backends of this repository and on the honest ones: long, run by `make prove`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dougong_compat.manifest import read

MANIFESTS = Path(__file__).resolve().parents[1] / "dougong_compat" / "manifests"


def run(backend: str, profile: str, folder: Path) -> dict[str, Any]:
    """The report of a whole profile; its files lie in ``folder``."""
    command = [sys.executable, "-m", "dougong_compat", "run", "--backend", backend, "--profile", profile]
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, check=False)
    assert (folder / "report.json").is_file(), done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    bad = [case for case in report["cases"] if case["outcome"] not in ("PASS", "UNSUPPORTED")]
    assert report["verdict"] == "CONFORMANT", [report["reasons"], bad[:5]]
    assert done.returncode == 0
    return report


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("backend", "profile", "least"), [("cpu", "core", 5000), ("sim", "core", 1500)])
def test_backends_of_this_repository_are_conformant(backend: str, profile: str, least: int, tmp_path: Path) -> None:
    report = run(backend, profile, tmp_path)
    assert report["totals"]["pass"] >= least


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["honest-eager", "honest-tiled", "honest-split", "honest-late"])
def test_honest_backends_are_conformant(backend: str, tmp_path: Path) -> None:
    run(backend, "smoke", tmp_path)


@pytest.mark.parametrize("file", sorted(MANIFESTS.glob("*.toml")), ids=lambda file: file.stem)
def test_manifests_of_the_suite_can_be_read(file: Path) -> None:
    manifest = read(file.read_text(encoding="utf-8"), file.name)
    assert manifest.backend == file.stem
    assert manifest.tolerance == "strict" and not manifest.waivers
    assert manifest.declares("dtype:float32") and manifest.declares("dim:64") and manifest.declares("ratio:8")
