"""What the gfx targets are. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMPILED", "GfxTarget", "gfx_target"]

#: Targets that every kernel is compiled for on every change.
COMPILED = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")


@dataclass(frozen=True)
class GfxTarget:
    """``wave``: lanes that run in step. ``fp8``: which 8-bit floats the hardware converts: "fnuz", "ocp", or "" for
    none (their bytes are decoded then). ``like``: the compiled target whose settings it takes."""

    name: str
    family: str
    wave: int
    fp8: str
    like: str


def gfx_target(name: str) -> GfxTarget | None:
    """A target by LLVM's name, with or without feature flags ("gfx942:sramecc+:xnack-"); None for one that the kernels
    are not compiled for."""
    name = name.split(":")[0]
    if name == "gfx90a":
        return GfxTarget(name, "CDNA 2", 64, "", name)
    if name == "gfx942":
        return GfxTarget(name, "CDNA 3", 64, "fnuz", name)
    if name == "gfx950":
        return GfxTarget(name, "CDNA 4", 64, "ocp", name)
    if name.startswith("gfx11"):
        return GfxTarget(name, "RDNA 3", 32, "", "gfx1100")
    if name.startswith("gfx120"):
        return GfxTarget(name, "RDNA 4", 32, "ocp", "gfx1201")
    return None
