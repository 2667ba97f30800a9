"""Whether this machine has an Intel GPU that can be used, and the software for it. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from dougong.plugins import Probe
from dougong_kernels.torch_build import TorchBuild, torch_build

__all__ = ["probe"]

_LOADERS = ("usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib")
_REMEDY = "Install torch's XPU build (choose XPU in PyTorch's installation guide), 2.8 or newer."


def probe(
    root: Path = Path("/"),
    build: Callable[[], TorchBuild | None] = torch_build,
    has_triton: Callable[[], bool] = lambda: importlib.util.find_spec("triton") is not None,
) -> Probe:
    """Look for the device, Level Zero, torch's build and Triton, in that order. The arguments are for tests."""
    nodes = [
        path for path in sorted((root / "sys/class/drm").glob("renderD*")) if _text(path / "device/vendor") == "0x8086"
    ]
    if not nodes:
        return Probe(
            ok=False,
            reason="no Intel GPU was found (no render node of vendor 0x8086)",
            remedy="Install Intel's GPU driver; in a container, pass --device=/dev/dri.",
        )
    devices = tuple(f"{_text(path / 'device/device') or 'GPU'} ({path.name})" for path in nodes)
    opened = [path for path in nodes if os.access(root / "dev/dri" / path.name, os.R_OK | os.W_OK)]
    if not opened:
        return Probe(
            ok=False,
            reason=f"/dev/dri/{nodes[0].name} is missing or may not be opened by this user",
            remedy="Add the user to the group render; in a container, pass --device=/dev/dri and the group's number "
            "on the host: --group-add=$(getent group render | cut -d: -f3).",
        )
    if not any((root / folder / "libze_loader.so.1").exists() for folder in _LOADERS):
        return Probe(
            ok=False,
            reason="Level Zero was not found (libze_loader.so.1)",
            remedy="Install the packages libze1 and libze-intel-gpu1 of Intel's compute runtime.",
        )
    torch = build()
    if torch is None:
        return Probe(ok=False, reason="torch is not installed", remedy=_REMEDY)
    if not torch.xpu:
        return Probe(ok=False, reason=f"torch {torch.version} is a {torch.kind} build, not an XPU one", remedy=_REMEDY)
    if torch.minor < (2, 8):
        return Probe(ok=False, reason=f"torch {torch.version} is too old: 2.8 is the oldest that will do",
                     remedy=_REMEDY)  # fmt: skip
    if not has_triton():
        return Probe(ok=False, reason="Triton is not installed", remedy="pip install the Triton of this torch build.")
    return Probe(ok=True, reason=f"torch {torch.version}", devices=devices)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
