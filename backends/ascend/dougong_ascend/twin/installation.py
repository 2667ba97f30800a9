"""Putting the twin together in this process."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from dougong_ascend.twin import collectives, fused, others, wheel
from dougong_ascend.twin.device_module import extend
from dougong_ascend.twin.schemas import define_operators, fake_sdk
from dougong_ascend.twin.settings import settings

__all__ = ["install"]

_kept: list[Any] = []


def install() -> None:
    """See ``dougong_ascend.twin.install``."""
    if _kept:
        return
    sdk = sys.modules.get("torch_npu")
    if sdk is not None and not hasattr(sdk, "is_dougong_twin"):
        raise RuntimeError("the real torch_npu is imported in this process; the twin needs one of its own")
    folder = wheel.sources()
    # The simulated device is wanted by the twin alone, never by the backend: imported by name, only here.
    npu = importlib.import_module("dougong_sim.extension").install("npu")
    extend(npu)
    fake_sdk(npu, settings.soc)
    define_operators(folder)
    device = torch.device("npu", 0)
    libraries = [torch.library.Library(name, "FRAGMENT") for name in ("npu", "atb", "dougong_ascend_twin")]
    _kept.extend(libraries)
    fused.register(libraries[0], libraries[2], device)
    others.register(*libraries, device)
    collectives.register()
