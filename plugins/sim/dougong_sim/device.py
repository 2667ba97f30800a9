"""The device facts of the simulated accelerator. Importing this module builds and loads the extension."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dougong.hal import Collectives, Device
from dougong_sim.build import library_path
from dougong_sim.collectives import StagedCollectives
from dougong_sim.extension import install
from dougong_sim.graphs import SimGraphs

__all__ = ["SimDevice"]

install("sim")  # before any torch.device("sim"): the name exists only from here on


class SimDevice(Device):
    """One simulated device. Memory, streams, events and seeding are the defaults over ``torch.sim``."""

    type: ClassVar[str] = "sim"
    dist_backend: ClassVar[str] = "gloo"
    pins_memory: ClassVar[bool] = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.graphs = SimGraphs(index)

    @property
    def name(self) -> str:
        return str(self.module.get_device_name(self.index))

    def collectives(self, group: Any = None) -> Collectives:
        """Communication between ranks, for tensors of this device."""
        return StagedCollectives(group)

    def facts(self) -> dict[str, Any]:
        return {
            "limit_bytes": self.memory().total,
            "devices": self.module.device_count(),
            "torch": torch.__version__,
            "extension": str(library_path()),
        }
