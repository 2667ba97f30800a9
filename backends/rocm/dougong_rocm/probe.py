"""Whether this machine has an AMD GPU that can be used, and the software for it. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

from dougong.plugins import Probe
from dougong_kernels.torch_build import TorchBuild, torch_build
from dougong_rocm.targets import COMPILED, gfx_target

__all__ = ["probe", "seen_targets"]

_OLDEST_HIP = (6, 3)
"""What the oldest torch allowed was built with."""
_REMEDY = "Install torch's ROCm build (choose ROCm in PyTorch's installation guide), 2.8 or newer."


def probe(
    root: Path = Path("/"),
    build: Callable[[], TorchBuild | None] = torch_build,
    has_triton: Callable[[], bool] = lambda: importlib.util.find_spec("triton") is not None,
) -> Probe:
    """Look for the driver, the devices, torch's build and Triton, in that order. The arguments are for tests."""
    driver = root / "dev/kfd"
    if not driver.exists():
        return Probe(
            ok=False,
            reason="no AMD GPU driver was found (no /dev/kfd)",
            remedy="Install the amdgpu driver; in a container, pass --device=/dev/kfd --device=/dev/dri.",
        )
    if not os.access(driver, os.R_OK | os.W_OK):
        return Probe(
            ok=False,
            reason="/dev/kfd may not be opened by this user",
            remedy="Add the user to the groups render and video; in a container, pass the render group's number on the "
            "host: --group-add=$(getent group render | cut -d: -f3).",
        )
    targets = seen_targets(root)
    able = [name for name in targets if gfx_target(name) is not None]
    if not able:
        what = ", ".join(targets) if targets else "the driver lists no GPU"
        return Probe(
            ok=False,
            reason=f"{what}: no kernel is compiled for it (they are for {', '.join(COMPILED)} and their families)"
            if targets
            else what,
            remedy="The nearest that works is a GPU of CDNA 2, RDNA 3 or newer." if targets else "Look at rocminfo.",
        )
    torch = build()
    if torch is None:
        return Probe(ok=False, reason="torch is not installed", remedy=_REMEDY)
    if not torch.hip:
        return Probe(ok=False, reason=f"torch {torch.version} is a {torch.kind} build, not a ROCm one", remedy=_REMEDY)
    hip = tuple(int(part) for part in re.findall(r"\d+", torch.hip)[:2])
    if hip < _OLDEST_HIP:
        oldest = ".".join(map(str, _OLDEST_HIP))
        return Probe(
            ok=False,
            reason=f"torch {torch.version} was built with ROCm {torch.hip}: {oldest} is the oldest that will do",
            remedy=_REMEDY,
        )
    if not has_triton():
        return Probe(ok=False, reason="Triton is not installed", remedy="pip install the Triton of this torch build.")
    return Probe(ok=True, reason=f"ROCm {torch.hip}, {', '.join(sorted(set(able)))}", devices=tuple(able))


def seen_targets(root: Path = Path("/")) -> list[str]:
    """The gfx name of every GPU that the driver lists, in its order. CPUs are listed too, without compute units."""
    found = []
    nodes = sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*"), key=lambda path: int(path.name))
    for node in nodes:
        try:
            text = (node / "properties").read_text()
        except OSError:  # hidden from this container
            continue
        values = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
        number = int(values.get("gfx_target_version", "0"))
        if int(values.get("simd_count", "0")) and number:
            # 90402: major 9, minor 4, stepping 2, the last two in hexadecimal in LLVM's names (90010: gfx90a).
            found.append(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return found
