"""The commands that the documents name are there, and a Python that is too old is refused at once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def targets() -> set[str]:
    return set(re.findall(r"^  make (\S+)", make("help").stdout, re.MULTILINE))


def test_help_lists_the_commands() -> None:
    assert {"demo", "test", "prove", "lint", "format", "docs", "clean", "help"} <= targets()


def test_every_command_named_in_the_documents_is_there() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    )
    named = set(re.findall(r"(?:^|`|&& )(?:[A-Z]+=\S+ )*make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets()


def test_ci_runs_what_a_person_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make test", "make prove"]


def test_an_old_python_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    code = "import sys; sys.version_info = (3, 8, 1); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n', encoding="utf-8")
    old.chmod(0o755)
    done = make("demo", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr
    assert "is 3.8" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_second_demo_installs_nothing(tmp_path: Path) -> None:
    for stamp in (".made", ".demo", ".dev"):
        (tmp_path / stamp).touch()
    planned = make("--dry-run", "demo", f"VENV={tmp_path}").stdout
    assert "pip" not in planned
    assert "dougong generate" in planned
