"""The device facts that a backend brings. Defaults come from ``torch.get_device_module(type)``."""

from __future__ import annotations

from abc import ABC
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dougong.hal.cache import LayerCache, allocate_cache
from dougong.hal.collectives import Collectives
from dougong.hal.group import KVGroup

if TYPE_CHECKING:
    from dougong.hal.graph import GraphBackend

__all__ = ["Device", "MemoryInfo"]


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of device memory; ``free`` is what an allocation could still get."""

    free: int
    total: int


class Device(ABC):
    """One accelerator of one process.

    ``type`` is torch's device type, ``dist_backend`` the torch.distributed backend for collectives,
    ``pins_memory`` whether pinned host buffers make copies asynchronous, ``graphs`` the device's ability to record
    graphs (None: it has none), ``dtypes`` what models may run in, preferred first, ``fp8_dtype`` what
    ``kv_cache_dtype="fp8"`` means here (some hardware has an 8-bit float of its own).
    """

    type: ClassVar[str]
    dist_backend: ClassVar[str] = "gloo"
    pins_memory: ClassVar[bool] = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    graphs: GraphBackend | None = None

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.torch_device = torch.device(self.type, index)

    @property
    def module(self) -> Any:
        """torch's module of this device type (``torch.cuda`` and its like)."""
        return torch.get_device_module(self.type)

    @property
    def name(self) -> str:
        """The product's name, to show."""
        return self.type

    def setup(self) -> None:
        """Make this the current device of the process; called once before anything is allocated."""
        self.module.set_device(self.index)

    def memory(self) -> MemoryInfo:
        """Free and total bytes now, memory that torch's allocator holds but does not use counted as free."""
        free, total = self.module.mem_get_info(self.index)
        held = self.module.memory_reserved(self.index) - self.module.memory_allocated(self.index)
        return MemoryInfo(free + held, total)

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        self.module.synchronize(self.index)

    def new_stream(self) -> Any:
        """A side stream for copies, or None where work is done in order on one stream. Without ``wait_event(event)`` it
        is not used."""
        return self.module.Stream(self.index)

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Launch on ``stream`` inside the ``with`` block (a no-op for None)."""
        return nullcontext() if stream is None else self.module.stream(stream)

    def new_event(self) -> Any:
        """An event with ``record()`` (on the stream that is current), ``synchronize()`` and ``query()``."""
        return self.module.Event()

    def empty_cache(self, group: KVGroup, blocks: int) -> LayerCache:
        """An uninitialised cache of ``blocks`` kernel blocks for one layer of ``group``."""
        return allocate_cache(group.spec, group.layout, blocks, group.kernel_block, self.torch_device)

    def collectives(self, group: Any = None) -> Collectives:
        """Communication with the other ranks of ``group`` (a torch.distributed group; None: all ranks)."""
        return Collectives(group)

    def facts(self) -> dict[str, Any]:
        """What ``dougong doctor`` shows: driver, toolkit, compute capability, instruction set …"""
        return {}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said that there is no more. Not every device raises torch's own type."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower().replace("_", " ")  # a library's status may be its constant: …_ALLOC_FAILED
    known = ("out of memory", "not enough memory", "can't allocate memory", "alloc failed")
    return any(words in text for words in known)
