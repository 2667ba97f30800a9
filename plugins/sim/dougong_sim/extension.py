"""Loading the extension and giving torch's PrivateUse1 device its name, once per process."""

from __future__ import annotations

import threading
from types import ModuleType

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

from dougong.errors import PluginLoadError
from dougong_sim.build import build
from dougong_sim.device_module import make_module
from dougong_sim.settings import Settings, read_settings

__all__ = ["install"]

_lock = threading.Lock()
_UNNAMED = "privateuseone"


def install(name: str = "sim", settings: Settings | None = None) -> ModuleType:
    """Make ``torch.device(name)`` exist and return ``torch.<name>``. A second call does nothing more.

    The name can be another vendor's (``"npu"``): a twin then runs that vendor's own code on this device. torch has one
    such device per process.

    Raises:
        PluginLoadError: the extension cannot be built, or the process's device already has another name.
        ConfigError: a ``DOUGONG_SIM_…`` variable cannot be used.
    """
    with _lock:
        taken = torch._C._get_privateuse1_backend_name()
        if taken != _UNNAMED:
            known: ModuleType | None = getattr(torch, taken, None)
            if taken == name and known is not None and hasattr(known, "is_dougong_sim"):
                return known
            raise PluginLoadError(
                f"torch's PrivateUse1 device is already {taken!r} in this process and cannot become {name!r} too; "
                "use one such backend per process",
                plugin="sim",
            )
        settings = settings or read_settings()
        torch.ops.load_library(str(build()))
        ops = torch.ops.dougong_sim
        ops.set_device_count(settings.devices)
        for index in range(settings.devices):
            ops.set_capacity(index, settings.memory)
        ops.set_poison(settings.poison)
        ops.set_late_transfers(settings.late_transfers)
        rename_privateuse1_backend(name)
        module = make_module(name)
        torch._register_device_module(name, module)
        # tensor.sim(), tensor.is_sim, module.sim(), storage.sim() …, as for every device type.
        generate_methods_for_privateuse1_backend(for_storage=True)
        return module
