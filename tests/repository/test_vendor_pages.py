"""The vendor pages: each has its sections and says what is proved, and every command that it names is there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "vendors"
BACKENDS = ("cpu", "cuda", "rocm", "xpu", "ascend")
KNOWN = ("hygon", "metax", "moore-threads", "cambricon", "iluvatar", "kunlun")
PROOFS = ("hardware", "twin", "compiled", "schema")


def text_of(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def headings(name: str) -> list[str]:
    return re.findall(r"^## (.+)$", text_of(name), re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `dougong …` in a vendor page or the containers' page, in a fence or in a line."""
    found = []
    for path in [*sorted(PAGES.glob("*.md")), ROOT / "docs" / "containers.md"]:
        text = path.read_text(encoding="utf-8")
        fences = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for fence in fences for line in re.sub(r"\\\n\s*", " ", fence).splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        for line in lines:
            for part in line.partition("#")[0].split("&&"):
                words = re.sub(r"^([A-Z_]+=\S+ )+", "", part.strip())
                if re.match(r"(dougong|python -m dougong_\w+\.\w+|pip install)( |$)", words):
                    found.append((path.name, words))
    return found


def test_every_page_of_the_plan_is_there() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {*BACKENDS, *KNOWN, "README", "new-accelerator"}
    index = text_of("README")
    assert all(f"({name}.md)" in index for name in (*BACKENDS, *KNOWN, "new-accelerator"))


@pytest.mark.parametrize("name", BACKENDS)
def test_pages_of_backends_have_their_sections(name: str) -> None:
    found = headings(name)
    for section in ("Install", "What runs", "Refused", "A first run on hardware: what to check, in this order"):
        assert section in found, f"{name}.md has no section {section!r}"
    proof = re.search(r"\*\*Level of proof: (\w+)", text_of(name))
    assert proof is not None and proof.group(1) in PROOFS
    row = next(line for line in text_of("README").splitlines() if f"({name}.md)" in line)
    assert row.rstrip(" |").rpartition("|")[2].strip().startswith(proof.group(1)), "the index claims another proof"


@pytest.mark.parametrize("name", BACKENDS)
def test_first_runs_are_numbered_checks_with_commands(name: str) -> None:
    rows = re.findall(
        r"^\| (\d+) \| .+ \| (.*?) \|(?: .*)?\|?$", text_of(name).partition("## A first run")[2], re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 5
    assert f"-b {name} -p c" in text_of(name), "the suite's report ends the list"


@pytest.mark.parametrize("name", KNOWN)
def test_pages_of_others_claim_nothing(name: str) -> None:
    assert headings(name) == [
        "What is known", "What dougong does today", "What is missing", "First steps on a machine that has one",
    ]  # fmt: skip
    text = text_of(name)
    assert "**Level of proof: none.**" in text
    assert "https://" in text.partition("## What is known")[2].partition("##")[0], "facts have sources"


def test_the_inventory_points_at_pages_that_exist() -> None:
    table = json.loads((ROOT / "core/dougong/hal/accelerators.json").read_text(encoding="utf-8"))
    named = [entry["install"].removeprefix("see ") for entry in table if entry["install"].startswith("see ")]
    assert len(named) == len(KNOWN) and all((ROOT / page).is_file() for page in named)


@lru_cache(maxsize=1)
def program() -> Any:
    from dougong.cli.app import build_app

    return typer.main.get_command(build_app())


def check_dougong(words: list[str]) -> str:
    """What is wrong with a `dougong …` command line, '' if its subcommand and options exist."""
    command: Any = program()
    words = words[1:]
    while words and isinstance(getattr(command, "commands", None), dict):
        if words[0].startswith("-") or words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for option in command.params if isinstance(option, click.Option) or hasattr(option, "opts")
             for name in (*option.opts, *option.secondary_opts)}  # fmt: skip
    wrong = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    return f"no option {wrong[0]}" if wrong else ""


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_commands_exist(page: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "dougong":
        assert not check_dougong(words), f"{page}: {line}"
    elif words[0] == "python":
        module = words[2]
        assert importlib.util.find_spec(module) is not None, f"{page}: {line}"
    else:
        for name in re.findall(r"dougong\[([\w,]+)\]", line):
            extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(f"\n{extra} = [" in extras for extra in name.split(",")), f"{page}: {line}"
        for name in re.findall(r"(?<![\w-])dougong-([a-z]+)\b(?!\.)", line):
            folder = {"kernels": "kernels", "compat": "compat_tests", "sim": "plugins/sim"}.get(
                name, f"backends/{name}"
            )
            assert (ROOT / folder).is_dir(), f"{page}: {line}"


def test_what_is_wrong_would_be_caught() -> None:
    assert check_dougong(["dougong", "compact", "run"]) == "no command 'compact'"
    assert check_dougong(["dougong", "compat", "run", "--backed", "cpu"]) == "no option --backed"
    assert len(commands()) > 60
