"""A vendor's road: generate a package, install it, pass, plant a bug, fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dougong_compat.template.write import write_package


def compat(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with what lies in ``package`` installed: on the path, entry point and all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(package), *sys.path])}
    return subprocess.run(
        [sys.executable, "-m", "dougong_compat", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=package,
        timeout=280,
    )


def install(package: Path, name: str) -> None:
    """What an editable install leaves behind: a dist-info with the entry point, beside the package."""
    info = package / f"dougong_{name}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dougong-{name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[dougong]\n{name} = dougong_{name}\n")


def test_names_and_folders_are_checked(tmp_path: Path) -> None:
    for name in ("My-Dev", "9x", "a b", ""):
        with pytest.raises(ValueError, match="backend name"):
            write_package(name, tmp_path / "x")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        write_package("mydev", tmp_path / "there")


@pytest.mark.prove
def test_a_generated_backend_is_found_and_a_bug_in_it_too(tmp_path: Path) -> None:
    package = tmp_path / "dougong-mydev"
    written = write_package("mydev", package)
    assert {path.name for path in written} >= {
        "pyproject.toml",
        "compat.toml",
        "test_compat.py",
        "compat.yml",
        ".gitlab-ci.yml",
        "README.md",
    }
    assert not any("@" in path.read_text() and "@name@" in path.read_text() for path in written)
    install(package, "mydev")
    case = ("-k", "L1/attention/mandatory", "-k", "L1/attention/window/q5-kv2", "--json")
    done = compat(package, "run", "--backend", "mydev", "--profile", "smoke", *case)
    report = json.loads(done.stdout)
    assert report["totals"]["fail"] == 0 and report["totals"]["pass"] > 60, done.stderr
    assert report["cases"][0]["provider"] == "mydev (mydev)"
    assert report["manifest"]["source"].endswith("compat.toml")
    plant_a_bug(package)
    done = compat(package, "run", "--backend", "mydev", "--profile", "smoke", *case)
    assert json.loads(done.stdout)["totals"]["fail"] > 0
    done = compat(package, "run", "--backend", "nobody", "--profile", "smoke")
    assert done.returncode == 3 and "nobody" in done.stderr


def test_ci_workflows_run_the_suite(tmp_path: Path) -> None:
    written = {path.name: path for path in write_package("mydev", tmp_path / "p")}
    hub = yaml.safe_load(written["compat.yml"].read_text())
    lab = yaml.safe_load(written[".gitlab-ci.yml"].read_text())["conformance"]
    steps = [step["run"] for step in hub["jobs"]["compat"]["steps"] if "run" in step]
    assert [line for line in steps if "compat run --backend mydev" in line and "--out report" in line]
    assert [line for line in lab["script"] if "compat run --backend mydev" in line and "--out report" in line]
    assert lab["artifacts"]["reports"]["junit"] == "report/junit.xml" and lab["artifacts"]["when"] == "always"
    assert [rule["variables"]["PROFILE"] for rule in lab["rules"]] == ["full", "core"]


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_a_generated_backend_is_conformant_until_a_bug_is_planted(tmp_path: Path) -> None:
    """As a vendor has it: written, installed by pip, run; then with a bug in what pip installed."""
    write_package("mydev", tmp_path / "dougong-mydev")
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "--target",
        str(site),
    ]
    if importlib.util.find_spec("hatchling"):
        pip.append("--no-build-isolation")
    subprocess.run([*pip, str(tmp_path / "dougong-mydev")], check=True, timeout=300)
    assert (site / "dougong_mydev" / "compat.toml").is_file()
    done = compat(site, "run", "--backend", "mydev", "--profile", "smoke", "--out", str(tmp_path / "good"))
    assert done.returncode == 0, done.stderr[-3000:]
    plant_a_bug(site)
    done = compat(site, "run", "--backend", "mydev", "--profile", "smoke", "--out", str(tmp_path / "bad"))
    assert done.returncode == 1, done.stderr[-3000:]
    page = (tmp_path / "bad" / "report.html").read_text(encoding="utf-8")
    assert "NOT" in page and "dougong compat repro" in page


def plant_a_bug(package: Path) -> None:
    """The causal mask hides one key too many."""
    file = package / "dougong_mydev" / "attention.py"
    text = file.read_text()
    assert text.count("hidden = k_pos[None, :] > q_pos") == 1
    file.write_text(text.replace("hidden = k_pos[None, :] > q_pos", "hidden = k_pos[None, :] >= q_pos"))
