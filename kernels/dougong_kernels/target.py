"""What a torch device is to Triton: the target's name, its number of cores, what its compiler can convert."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

__all__ = ["available", "cores", "early_start", "fp8_mode", "interpreted", "target_name"]

_INTERPRETED_CORES = 4


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (on CPU tensors, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def available(device: torch.device) -> str:
    """Why Triton kernels cannot run on this device; '' if they can."""
    if device.type == "cpu" and not interpreted():
        return "Triton kernels run on a GPU (or on the CPU with TRITON_INTERPRET=1, slowly)"
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"no Triton target is known for device type {device.type!r}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)}: 8.0 or newer is needed"
    return ""


@lru_cache(maxsize=16)
def target_name(device: torch.device) -> str:
    """ "sm90", "gfx942", "xpu", or "cpu" for the interpreter."""
    if device.type == "cuda":
        if torch.version.hip:
            return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


@lru_cache(maxsize=16)
def early_start(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin before the kernel in front of it has ended; {} where that does not exist.

    ``DOUGONG_EARLY_START=0`` turns it off, to find out whether a fault or a gain comes from it.
    """
    if device.type != "cuda" or torch.version.hip or os.environ.get("DOUGONG_EARLY_START") == "0":
        return {}
    known = find_spec("triton.language.extra.cuda.gdc") is not None
    return {"launch_pdl": True} if known and torch.cuda.get_device_capability(device) >= (9, 0) else {}


@lru_cache(maxsize=16)
def cores(device: torch.device) -> int:
    """Multiprocessors (NVIDIA), compute units (AMD), subslices (Intel)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return int(getattr(properties, "gpu_subslice_count", 32))
    return _INTERPRETED_CORES


def fp8_mode(target: str, dtype: torch.dtype) -> int:
    """How a cache of ``dtype`` is read. 0: it is no fp8; 1: the hardware converts it; 2, 3: e4m3 (OCP's) and e4m3fnuz
    are decoded from their bytes, so that either kind of cache is right on any target."""
    if dtype == torch.float8_e4m3fnuz:
        return 1 if target == "gfx942" else 3
    if dtype != torch.float8_e4m3fn:
        return 0
    if target.startswith("sm"):
        return 1 if int(target[2:]) >= 89 else 2
    return 1 if target in ("gfx950", "gfx1200", "gfx1201") else 2
