"""Examples that the documents show are run, notebooks included.

A code block is run when the line before it says so: ``<!-- run -->`` in `make test`, ``<!-- run: prove -->``
in `make prove`, for those that load the packaged model. Python and bash blocks can be run; a block must end
with exit status 0 and write nothing outside the folder it is given. Files in docs/examples/ are run too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"^<!-- run(?P<when>: prove)? -->\n```(?P<language>\w+)\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Example:
    page: str
    line: int
    language: str
    code: str
    prove: bool


def examples() -> list[Example]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages += sorted(path for part in ("backends", "plugins") for path in (ROOT / part).glob("*/README.md"))
    return [
        Example(
            page=page.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start()) + 1,
            language=match["language"],
            code=match["code"],
            prove=match["when"] is not None,
        )
        for page in pages
        for text in [page.read_text(encoding="utf-8")]
        for match in _BLOCK.finditer(text)
    ]


def parameters() -> list[object]:
    marks = {True: [pytest.mark.prove], False: []}
    return [pytest.param(e, id=f"{e.page}:{e.line}", marks=marks[e.prove]) for e in examples()]


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("example", parameters())
def test_example_in_a_page(example: Example, tmp_path: Path) -> None:
    if example.language == "python":
        script = tmp_path / "example.py"
        script.write_text(example.code, encoding="utf-8")
        run([sys.executable, str(script)], tmp_path)
    else:
        assert example.language in ("bash", "sh"), f"{example.page}:{example.line} cannot be run"
        run(["bash", "-euo", "pipefail", "-c", example.code], tmp_path)


SCRIPTS = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example_script(script: Path, tmp_path: Path) -> None:
    run([sys.executable, str(script)], tmp_path)


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_example_notebook(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "a notebook is kept without its outputs"
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text(code, encoding="utf-8")
    run([sys.executable, str(script)], tmp_path)


def test_marked_blocks_are_found() -> None:
    text = "words\n\n<!-- run: prove -->\n```python\nprint(1)\n```\n\n```python\nnot run\n```\n"
    (match,) = _BLOCK.finditer(text)
    assert (match["when"], match["language"], match["code"]) == (": prove", "python", "print(1)\n")


def test_no_mark_stands_alone() -> None:
    for page in sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}):
        text = page.read_text(encoding="utf-8")
        marks = len(re.findall(r"^<!-- run\b", text, re.MULTILINE))
        assert marks == len(_BLOCK.findall(text)), f"{page}: a run mark without a code block after it"
