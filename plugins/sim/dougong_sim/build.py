"""Compiling the torch extension, once per torch version and source.

One call of the C++ compiler, about half a minute; no ninja, no Python headers. The library lies under
``$XDG_CACHE_HOME/dougong/sim`` (default ``~/.cache``). Imports no torch, so that the probe can ask what is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from dougong.errors import PluginLoadError

__all__ = ["build", "library_path", "obstacle"]

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
OLDEST_TORCH = (2, 11)


def compiler() -> str | None:
    """The C++ compiler to call: ``$CXX``, or the first of the usual names."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("c++", "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


def torch_version() -> str:
    """The installed torch's version, '' without one. Does not import it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


@cache
def library_path() -> Path:
    """Where the library of this source for the installed torch lies, built or not."""
    key = hashlib.sha256(repr((torch_version(), platform.machine(), FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "dougong" / "sim" / key.hexdigest()[:16] / "libdougong_sim.so"


def obstacle() -> tuple[str, str]:
    """Why the extension cannot be had here, and what to do; two empty strings if it can."""
    if not sys.platform.startswith("linux"):
        return f"the simulated device is built on Linux only, this is {sys.platform}", "use the cpu backend"
    found = torch_version()
    if not found:
        return "torch is not installed", f"pip install 'torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}'"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        return (
            f"torch {found} is too old, the extension needs {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer",
            f"pip install 'torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}'",
        )
    if compiler() is None and not library_path().exists():
        wanted = os.environ.get("CXX")
        what = (
            f"the C++ compiler CXX={wanted} was not found"
            if wanted
            else "no C++ compiler (c++, g++, clang++) was found"
        )
        return what, "install g++ 11 or newer, or name one in CXX"
    return "", ""


def build() -> Path:
    """The built library; compiles it if need be. Safe when several processes call it at once.

    Raises:
        PluginLoadError: something is missing (see ``obstacle``), or the compiler failed; with its last lines.
    """
    target = library_path()
    if target.exists():
        return target
    reason, remedy = obstacle()
    if reason:
        raise PluginLoadError(f"the sim backend cannot be built: {reason}. {remedy}", plugin="sim")
    import fcntl  # only where `obstacle` let us through

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.parent / "lock", "w")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise PluginLoadError(
            f"the sim backend is built in {target.parent}, which cannot be written: {error}. "
            "Point XDG_CACHE_HOME to a folder that can",
            plugin="sim",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling: wait for its result
        if not target.exists():
            _compile(target)
    return target


def _compile(target: Path) -> None:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_root = Path(spec.origin).parent
    include, libraries = torch_root / "include", torch_root / "lib"
    # Beside the target, then renamed: a reader never sees half a library.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [
            str(compiler()), *FLAGS, str(SOURCES / "sim.cpp"), "-o", str(made),
            f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-L{libraries}", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = "\n".join(line for line in done.stderr.splitlines() if "error" in line)[-2000:]
            raise PluginLoadError(
                f"the sim backend's extension did not compile with {command[0]} against torch {torch_version()}:\n"
                f"{lines or done.stderr[-2000:]}",
                plugin="sim",
            )
        os.replace(made, target)
