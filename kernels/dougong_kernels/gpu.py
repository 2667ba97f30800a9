"""What GPUs have in common, whichever vendor's build of torch drives them."""

from __future__ import annotations

from typing import Any, ClassVar

from dougong.errors import BackendNotFoundError
from dougong.hal import Device

__all__ = ["GpuDevice"]


class GpuDevice(Device):
    """One GPU through torch. Memory, streams, events and seeding are the defaults over torch's module.

    ``kind`` is what messages call such a device, ``visible`` the environment variable that hides devices.
    """

    pins_memory: ClassVar[bool] = True
    kind: ClassVar[str]
    visible: ClassVar[str]

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        count = int(self.module.device_count())
        if index >= count:
            raise BackendNotFoundError(
                f"device_index={index} was asked for; torch sees {count} {self.kind} device(s), numbered from 0. "
                f"Choose another, or look at {self.visible}."
            )
        self.properties: Any = self.module.get_device_properties(index)

    @property
    def name(self) -> str:
        return str(self.properties.name)
