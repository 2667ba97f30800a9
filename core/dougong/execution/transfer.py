"""Small arrays to the device and results back, without waiting."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from dougong.hal import Device

__all__ = ["HostCopies", "Transfer"]


class HostCopies:
    """Device tensors on their way to the host. `get` waits for them, and for nothing later.

    Args:
        tensors: on the host.
        event: recorded behind their copies; None if they are there.
        sources: what is being copied. Held until it has arrived: the allocator knows the compute stream alone, and
            would hand its memory to a later step there while another stream still reads it.
    """

    __slots__ = ("_event", "_sources", "_tensors")

    def __init__(self, tensors: list[torch.Tensor], event: Any, sources: list[torch.Tensor] | None = None) -> None:
        self._tensors = tensors
        self._event = event
        self._sources = sources

    def get(self) -> list[torch.Tensor]:
        """The host tensors, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
            self._event = self._sources = None
        return self._tensors


class Transfer:
    """Copies between host and one device. Pinned memory comes from torch's caching host allocator, which hands it out
    again only after its copies have run.

    What goes to the host goes on a stream of its own where the device has one, behind what it was computed by and
    beside the step that follows.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.where = device.torch_device
        self.on_host = self.where.type == "cpu"
        self._pins = device.pins_memory and not self.on_host
        side = device.new_stream() if self._pins else None
        # Plugins of contract (1, 0) owe no stream that waits for events; without one all is in order on one stream.
        self._side = side if hasattr(side, "wait_event") else None

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A device tensor with the array's values. The array must not be changed afterwards."""
        tensor = torch.from_numpy(array)
        if self.on_host:
            return tensor
        if self._pins:
            return tensor.pin_memory().to(self.where, non_blocking=True)
        return tensor.to(self.where)

    def to_host(self, tensors: list[torch.Tensor], *, aside: bool = True) -> HostCopies:
        """Start copies of device tensors, as they are when all that was launched before has run.

        aside: on the side stream. The caller then lets nobody write to the tensors again (a step's results, never a
        buffer that the next step fills anew), and their memory is held until the copies are taken. Else in order
        with the steps, for what is large.
        """
        if self.on_host:
            return HostCopies(tensors, None)
        if not self._pins:
            return HostCopies([tensor.to("cpu") for tensor in tensors], None)
        side = self._side if aside else None
        if side is not None:
            computed = self.device.new_event()
            computed.record()
            side.wait_event(computed)
        with self.device.stream(side):
            copies = []
            for tensor in tensors:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
            arrived = self.device.new_event()
            arrived.record()
        return HostCopies(copies, arrived, None if side is None else tensors)
