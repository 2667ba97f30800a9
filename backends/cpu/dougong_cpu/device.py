"""The machine's processor as a dougong device."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, ClassVar

import torch

from dougong.errors import ConfigError
from dougong.hal import Device, MemoryInfo
from dougong_cpu.library import ENV_ISA, load, unavailable_reason

__all__ = ["CpuDevice"]

_CGROUP = (  # (limit, usage) files of control groups, version 2 then 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class CpuDevice(Device):
    """Host memory and cores. Work is done in order by the calling thread, so there is nothing to wait for."""

    type: ClassVar[str] = "cpu"
    dist_backend: ClassVar[str] = "gloo"
    pins_memory: ClassVar[bool] = False

    def __init__(self, index: int = 0) -> None:
        if index:
            raise ConfigError(f"device_index={index}: the host is one device, 0; ranks of a model share it.")
        self.index = index
        self.torch_device = torch.device("cpu")
        # fp16 arithmetic comes last: no machine here is faster in it than in bfloat16.
        self.dtypes = (torch.bfloat16, torch.float32, torch.float16)

    @property
    def name(self) -> str:
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
        return platform.processor() or platform.machine()

    def setup(self) -> None:
        """Nothing to select."""

    def memory(self) -> MemoryInfo:
        """Available memory of the machine, or of the control group if that is less."""
        free, total = _machine_memory()
        for limit_file, usage_file in _CGROUP:
            try:
                limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            except (OSError, ValueError):
                continue
            if limit < total:
                total, free = limit, min(free, max(0, limit - usage))
        return MemoryInfo(free, total)

    def synchronize(self) -> None:
        """All work is done when a call returns."""

    def new_stream(self) -> Any:
        return None

    def new_event(self) -> Any:
        return _Event()

    def facts(self) -> dict[str, Any]:
        reason = unavailable_reason()
        facts: dict[str, Any] = {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "native library": reason or str(load().path),
        }
        if not reason:
            able = [name for name, usable in load().variants.items() if usable]
            facts["instruction set"] = f"{load().isa} (of {', '.join(able)}; {ENV_ISA} chooses)"
        return facts


class _Event:
    """An event of work that is done before the next line runs."""

    def record(self, stream: Any = None) -> None:
        del stream

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _machine_memory() -> tuple[int, int]:
    """(available, total) bytes."""
    found = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found[key] = int(value.split()[0]) * 1024
        return found["MemAvailable"], found["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
