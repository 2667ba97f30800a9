"""Whether this machine has an Ascend NPU and the software for it. Imports no SDK and no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dougong.plugins import Probe

__all__ = ["probe"]

_OLDEST_TORCH_NPU = (2, 8)
"""The first with ``npu_scatter_pa_kv_cache`` and ``npu_fused_infer_attention_score_v2`` side by side."""
_OLDEST_CANN = (8, 2)
_CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_CANN_DEFAULT = "usr/local/Ascend/ascend-toolkit/latest"
_CANN_REMEDY = "Install CANN 8.2 or newer and run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`."


def probe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Probe:
    """Look for the device, torch-npu and CANN, in that order. ``root`` and ``environ`` are for tests."""
    devices = _devices(root)
    if not devices:
        return Probe(
            ok=False,
            reason="no Ascend device was found (no /dev/davinci0 and no other number)",
            remedy="Install the NPU driver and firmware; in a container, pass /dev/davinci0, /dev/davinci_manager, "
            "/dev/devmm_svm and /dev/hisi_hdc.",
        )
    torch = _version("torch")
    if torch is None:
        return Probe(ok=False, reason="torch is not installed", remedy="Install torch's CPU build.")
    wanted = f"pip install 'torch-npu=={torch[0]}.{torch[1]}.*'"
    sdk = _version("torch-npu")
    if sdk is None:
        return Probe(ok=False, reason="torch-npu is not installed", remedy=wanted)
    if sdk[:2] < _OLDEST_TORCH_NPU:
        oldest = ".".join(map(str, _OLDEST_TORCH_NPU))
        return Probe(ok=False, reason=f"torch-npu {_text(sdk)} is too old: {oldest} is the oldest that will do",
                     remedy=f"Upgrade torch, then {wanted}")  # fmt: skip
    if sdk[:2] != torch[:2]:
        return Probe(
            ok=False,
            reason=f"torch-npu {_text(sdk)} is for torch {sdk[0]}.{sdk[1]}; torch {_text(torch)} is installed",
            remedy=f"{wanted}, or pip install 'torch=={sdk[0]}.{sdk[1]}.*'",
        )
    home = next((Path(environ[name]) for name in _CANN_HOMES if environ.get(name)), root / _CANN_DEFAULT)
    if not home.is_dir():
        return Probe(ok=False, reason=f"CANN was not found ({home} is no directory)", remedy=_CANN_REMEDY)
    cann = _cann_version(home)
    if cann is not None and cann < _OLDEST_CANN:
        oldest = ".".join(map(str, _OLDEST_CANN))
        return Probe(ok=False, reason=f"CANN {_text(cann)} is too old: {oldest} is the oldest that will do",
                     remedy=_CANN_REMEDY)  # fmt: skip
    found = f"torch-npu {_text(sdk)}, CANN {_text(cann) if cann else 'of unknown version'}"
    return Probe(ok=True, reason=found, devices=tuple(devices))


def _devices(root: Path) -> list[str]:
    found = [path for path in (root / "dev").glob("davinci*") if path.name[len("davinci") :].isdigit()]
    return [f"npu:{path.name[len('davinci') :]}" for path in sorted(found, key=lambda path: int(path.name[7:]))]


def _version(distribution: str) -> tuple[int, ...] | None:
    try:
        return _numbers(version(distribution))
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """``"2.13.0.post1+cpu"`` -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else (0,)


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _cann_version(home: Path) -> tuple[int, ...] | None:
    """From the files that CANN's installers leave; None where none of them says."""
    candidates = [*home.glob("*/ascend_toolkit_install.info"), home / "version.cfg", *home.glob("opp/version.info")]
    for path in candidates:
        if path.is_file():
            match = re.search(r"(?im)^\s*version\s*=\s*\[?(\d+(?:\.\d+)+)", path.read_text(errors="replace"))
            if match:
                return _numbers(match.group(1))
    return None
