"""Backends that come with the suite, by name: the module that registers each."""

from __future__ import annotations

__all__ = ["BUILT_IN", "HONEST"]

_HERE = "dougong_compat.selftest"

#: Independent implementations that must pass.
HONEST = {
    "honest-eager": f"{_HERE}.honest",
    "honest-tiled": f"{_HERE}.honest",
    "honest-split": f"{_HERE}.honest",
    "honest-late": f"{_HERE}.late",
}

BUILT_IN = {"reference": f"{_HERE}.reference_backend", **HONEST}
