"""The targets that kernels are compiled for without their hardware, and what each allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """``shared``: bytes of shared memory that one program may have. ``registers``: 32-bit registers of one thread."""

    name: str
    backend: str
    wave: int
    shared: int
    registers: int

    def triton(self) -> Any:
        """Triton's own description."""
        from triton.backends.compiler import GPUTarget

        arch = int(self.name[2:]) if self.backend == "cuda" else self.name
        return GPUTarget(self.backend, arch, self.wave)

    @property
    def early(self) -> bool:
        """Whether a kernel may be launched before the one in front of it has ended."""
        return self.name in ("sm90", "sm100")

    @property
    def native_fp8(self) -> str:
        """Triton's name of the 8-bit float that the hardware converts; '' where its bytes are decoded."""
        if self.name == "gfx942":
            return "fp8e4b8"
        return "fp8e4nv" if self.name in ("sm90", "sm100", "gfx950", "gfx1201") else ""


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", "cuda", 32, 163 << 10, 255),
        Target("sm90", "cuda", 32, 227 << 10, 255),
        Target("sm100", "cuda", 32, 227 << 10, 255),
        # CDNA counts its 256 accumulation registers with the 256 others.
        Target("gfx90a", "hip", 64, 64 << 10, 512),
        Target("gfx942", "hip", 64, 64 << 10, 512),
        Target("gfx950", "hip", 64, 160 << 10, 512),
        Target("gfx1100", "hip", 32, 64 << 10, 256),
        Target("gfx1201", "hip", 32, 64 << 10, 256),
    )
}
