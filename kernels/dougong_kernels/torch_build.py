"""Which accelerator the installed torch was built for, read from its files: importing torch takes seconds, and may fail
where its accelerator's libraries are missing."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TorchBuild", "torch_build"]


@dataclass(frozen=True)
class TorchBuild:
    """``cuda``, ``hip`` and ``xpu`` are the toolkit's version that torch was built with, '' for none."""

    version: str
    cuda: str = ""
    hip: str = ""
    xpu: str = ""

    @property
    def kind(self) -> str:
        """ "CUDA", "ROCm", "XPU" or "CPU"."""
        return "CUDA" if self.cuda else "ROCm" if self.hip else "XPU" if self.xpu else "CPU"

    @property
    def minor(self) -> tuple[int, ...]:
        """(2, 13) of ``2.13.0+rocm7.1``."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])


def torch_build(folder: Path | None = None) -> TorchBuild | None:
    """The installed torch; None where there is none. ``folder`` is torch's package folder, for tests."""
    if folder is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None

    def value(name: str) -> str:
        found = re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text.replace('"', "'"), re.MULTILINE)
        return found.group(1) if found else ""

    return TorchBuild(value("__version__"), value("cuda"), value("hip"), value("xpu"))
