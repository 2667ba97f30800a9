"""The text files of torch-npu's wheel: operator schemas and shape functions. Fetched once, never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

__all__ = ["VERSION", "WheelMissing", "sources"]

VERSION = "2.13.0"
_FILES = (
    "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml",
    "torch_npu/op_plugin/meta/_meta_registrations.py",
)


class WheelMissing(RuntimeError):
    """The wheel is not in the cache and could not be fetched; the message says why."""


def sources(cache: Path | None = None) -> Path:
    """The folder that holds ``torch_npu``'s text files; fetches the wheel into ``cache`` where they are missing.

    The cache is ``$XDG_CACHE_HOME/dougong/ascend-twin`` (default ``~/.cache``). The wheel is asked for by pip, with
    whatever index pip is set up for; the wheel itself (44 MB) is deleted again.

    Raises:
        WheelMissing: pip could not get it.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dougong" / "ascend-twin"
    folder = cache / VERSION
    if all((folder / name).is_file() for name in _FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The text files are the same for every interpreter: one fixed wheel serves all.
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11", "--abi", "cp311",
        "--platform", "manylinux_2_28_x86_64", "--dest", str(folder), f"torch-npu=={VERSION}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WheelMissing(f"pip could not fetch torch-npu {VERSION}: {error}") from error
    wheels = sorted(folder.glob("torch_npu-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise WheelMissing(f"pip could not fetch torch-npu {VERSION}: {last}")
    with zipfile.ZipFile(wheels[-1]) as archive:
        for name in _FILES:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")
            partial.write_bytes(archive.read(name))
            partial.replace(target)  # another process may be fetching too
    for wheel in wheels:
        wheel.unlink(missing_ok=True)
    return folder
