"""Putting the twin together in this process."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from dougong.errors import ConfigError
from dougong_xpu.twin import DEVICE_TYPE, ipex_ops, semantics, sgl_ops, vllm_ops
from dougong_xpu.twin.graphs import extend

__all__ = ["install"]

_LIBRARIES = {"vllm": vllm_ops, "sgl": sgl_ops, "ipex": ipex_ops}
_kept: list[Any] = []
_installed: set[str] = set()


def install(library: str, device: bool) -> None:
    """See ``dougong_xpu.twin.install``."""
    if library not in _LIBRARIES:
        raise ConfigError(f"an XPU twin of {library!r} was asked for; there are {', '.join(_LIBRARIES)}")
    if device:
        # The simulated device is wanted by the twin alone, never by the backend: imported by name, only here.
        extend(importlib.import_module("dougong_sim.extension").install(DEVICE_TYPE))
    if library in _installed:
        return
    chosen = _LIBRARIES[library]
    for name in chosen.MODULES:
        if name in sys.modules:
            raise RuntimeError(f"the real {name} is imported in this process; the twin needs one of its own")
    if not _kept:
        inner = torch.library.Library("dougong_xpu_twin", "DEF")
        _kept.append(inner)
        semantics.register(inner)
    _kept.extend(chosen.register())
    for name, contents in chosen.MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []  # a package without files
        module.__dict__.update(contents)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    _installed.add(library)
