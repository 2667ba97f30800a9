"""Whether an NVIDIA GPU can be used here, found without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util

from dougong.plugins import Probe
from dougong_kernels.torch_build import torch_build

__all__ = ["probe"]

_OLDEST_DRIVER = 12000
"""CUDA version, as the driver counts it, that the oldest torch allowed was built for."""

_STATUS = {
    3: ": not initialised",
    100: ": there is none",
    101: ": no such device; CUDA_VISIBLE_DEVICES may name one that is not there",
    802: ": not ready; on a machine with NVSwitch the fabric manager must run",
    803: ": the driver's library and its kernel module are of different versions; restart the machine",
    804: ": the CUDA compatibility library does not go with this card",
}
"""What the statuses of ``cuInit`` that are met in practice mean (CUDA driver API, ``CUresult``)."""


def probe() -> Probe:
    """Ask the driver library: its version, and the devices' names."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Probe(
            ok=False,
            reason="no NVIDIA driver was found (libcuda.so.1)",
            remedy="Install NVIDIA's driver; in a container, start it with the NVIDIA runtime.",
        )
    status = driver.cuInit(0)
    if status != 0:
        return Probe(
            ok=False,
            reason=f"the NVIDIA driver finds no device (cuInit gave {status}{_STATUS.get(status, '')})",
            remedy="See what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides the device.",
        )
    found = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(found))
    if found.value < _OLDEST_DRIVER:
        return Probe(
            ok=False,
            reason=f"the NVIDIA driver is too old: it speaks CUDA {_cuda(found.value)}, not {_cuda(_OLDEST_DRIVER)}",
            remedy="Upgrade the driver.",
        )
    if importlib.util.find_spec("triton") is None:
        return Probe(ok=False, reason="Triton is not installed", remedy="Install torch's CUDA build, which brings it.")
    build = torch_build()
    if build is None:
        return Probe(ok=False, reason="torch is not installed", remedy="Install torch's CUDA build.")
    if not build.cuda:
        return Probe(
            ok=False,
            reason=f"torch {build.version} is a {build.kind} build, not a CUDA one",
            remedy="Install torch's CUDA build.",
        )
    toolkit = int(build.cuda.split(".")[0])
    if found.value < 1000 * toolkit:  # an older minor version will do, an older major one will not
        return Probe(
            ok=False,
            reason=f"the NVIDIA driver is too old for this torch: it speaks CUDA {_cuda(found.value)}, and torch "
            f"{build.version} was built with CUDA {build.cuda}",
            remedy=f"Upgrade the driver to one for CUDA {toolkit}.0, or install a torch built with CUDA "
            f"{found.value // 1000}.",
        )
    return _devices(driver)


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _devices(driver: ctypes.CDLL) -> Probe:
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names, old = [], []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, 128, device)
        major = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
        (names if major.value >= 8 else old).append(name.value.decode(errors="replace"))
    if not names:
        if old:
            return Probe(
                ok=False,
                reason=f"{', '.join(old)}: older than compute capability 8.0",
                remedy="The kernels need a GPU of compute capability 8.0 or newer (A100 and later).",
            )
        return Probe(
            ok=False, reason="the driver lists no device", remedy="See whether CUDA_VISIBLE_DEVICES hides them."
        )
    return Probe(ok=True, reason=f"{len(names)} device(s)", devices=tuple(names))
