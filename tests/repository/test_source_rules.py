"""Rules of the house that no linter knows: vendor names, file sizes, machine paths, the oldest Python."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core" / "dougong"

#: Floors above `hal` (and the ground below it is vendor-free too, but may name extras in advice).
ABOVE_HAL = ("models", "scheduling", "kv", "execution", "engine", "cli", "server")
VENDOR = re.compile(
    r"(?<![a-z0-9])(cuda|nvidia|nccl|rocm|hip|amd|rccl|xpu|intel|ipex|xccl|npu|ascend|cann|hccl|musa|mlu|"
    r"flashinfer|flash_attn|aiter|cutlass|mkl|onednn|avx\d*|neon)(?![a-z0-9])",
    re.IGNORECASE,
)
LONGEST_FILE = 500


def tracked(pattern: str = "*") -> list[Path]:
    """Files that git knows or would add, so that a build's leavings do not count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout: the rules for sources are checked where the sources are kept")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def python_files() -> list[Path]:
    return tracked("*.py")


def code_tokens(path: Path) -> Iterator[tuple[int, str]]:
    """Names and string values of a file with their lines; comments and docstrings left out."""
    source = path.read_text(encoding="utf-8")
    documentation = {
        node.body[0].value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # From Python 3.12 on an f-string comes in pieces.
        if tokenize.tok_name[token.type] in ("NAME", "STRING", "FSTRING_MIDDLE"):
            if token.type == tokenize.NAME or token.start[0] not in documentation:
                yield token.start[0], token.string


def test_distributions_name_the_contract_they_were_written_for() -> None:
    """One that imported the core's own number would fit every core that it is ever installed beside."""
    folders = [ROOT / name for name in ("backends", "kernels", "plugins")]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files()
        if any(folder in path.parents for folder in folders) and "tests" not in path.parts
        for line, token in code_tokens(path)
        if token == "ABI"
    ]
    assert not found, f"a literal belongs there: {found}"


def test_no_vendor_name_above_hal() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for package in ABOVE_HAL
        for path in sorted((CORE / package).rglob("*.py"))
        for line, text in code_tokens(path)
        if VENDOR.search(text.replace("_", " "))
    ]
    assert not found, "vendor names belong to hal, plugins or a backend:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("'cuda'", True),
        ("torch.cuda", True),
        ("is_npu", True),
        ("use_flash_attn", True),
        ("chip", False),
        ("relationship", False),
        ("namdic", False),
    ],
)
def test_vendor_pattern_knows_words(text: str, vendor: bool) -> None:
    assert bool(VENDOR.search(text.replace("_", " ")) or VENDOR.search(text)) is vendor


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert not long, f"split these along their nouns (at most {LONGEST_FILE} lines): {long}"


def test_every_file_parses_on_the_oldest_python() -> None:
    for path in python_files():
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_nothing_names_a_machine_or_a_registry() -> None:
    # Spelled in parts, so that this file does not find itself.
    forbidden = re.compile(
        "|".join(["/" + "work/", "/opt/" + "pypi", "/opt/" + "wheels", r"/home/\w+/", "pypi" + r"\.org",
                  "pythonhosted" + r"\.org", "registry\\." + "npmjs", "deb\\." + "debian"])
    )  # fmt: skip
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if forbidden.search(line)
        ]
    assert not found, "paths of one machine and registry hosts are not committed:\n" + "\n".join(found)


def test_core_prints_only_in_the_cli() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted(CORE.rglob("*.py"))
        if path.relative_to(CORE).parts[0] != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found, f"print() outside dougong.cli: {found}"


def test_modules_of_the_core_say_what_they_hold() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path in sorted(CORE.rglob("*.py"))
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not missing, f"a module begins with a docstring: {missing}"
