"""One staging buffer and one copy per step.

A step's metadata lies in one block of 8-byte words: written by numpy on the host, copied once, and read on the device
through views. Host buffers rotate behind events, so that one is written again only after its copy was consumed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dougong.hal import Device

__all__ = ["DeviceViews", "HostBuffer", "Sections", "StagingRing"]

_KEPT_VIEWS = 128


class Sections:
    """Where each section of a step with T tokens, B rows and G groups lies, in 8-byte words.

    int64: token_ids [T], positions [T], slots [G, T], row_slots [B], sample_index [B], sample_slots [B],
    sample_positions [B]; int32: cu_q [B+1], kv_len [B]; int64: changes [G, 3, U].
    """

    __slots__ = ("changes", "cu_q", "groups", "kv_len", "positions", "row_slots", "rows", "sample_index",
                 "sample_positions", "sample_slots", "slots", "token_ids", "tokens")  # fmt: skip

    def __init__(self, tokens: int, rows: int, groups: int) -> None:
        self.tokens, self.rows, self.groups = tokens, rows, groups
        self.token_ids = 0
        self.positions = tokens
        self.slots = 2 * tokens
        self.row_slots = (2 + groups) * tokens
        self.sample_index = self.row_slots + rows
        self.sample_slots = self.sample_index + rows
        self.sample_positions = self.sample_slots + rows
        self.cu_q = self.sample_positions + rows
        self.kv_len = self.cu_q + (rows + 2) // 2
        self.changes = self.kv_len + (rows + 1) // 2

    @staticmethod
    def words(tokens: int, rows: int, groups: int) -> int:
        """Words of such a step, without the block-table changes."""
        return Sections(tokens, rows, groups).changes


class DeviceViews:
    """The sections as tensors over one base tensor of words (on the device, or the host's own)."""

    __slots__ = ("cu_q", "kv_len", "positions", "row_slots", "sample_index", "sample_positions", "sample_slots",
                 "sections", "slots", "token_ids")  # fmt: skip

    def __init__(self, base: torch.Tensor, sections: Sections) -> None:
        t, b = sections.tokens, sections.rows
        self.sections = sections

        def words(start: int, count: int) -> torch.Tensor:
            return base[start : start + count]

        self.token_ids = words(sections.token_ids, t)
        self.positions = words(sections.positions, t)
        self.slots = tuple(words(sections.slots + g * t, t) for g in range(sections.groups))
        self.row_slots = words(sections.row_slots, b)
        self.sample_index = words(sections.sample_index, b)
        self.sample_slots = words(sections.sample_slots, b)
        self.sample_positions = words(sections.sample_positions, b)
        self.cu_q = words(sections.cu_q, (b + 2) // 2).view(torch.int32)[: b + 1]
        self.kv_len = words(sections.kv_len, (b + 1) // 2).view(torch.int32)[:b]


class HostBuffer:
    """One host buffer with its event. ``array`` [words] int64 is written, ``tensor`` is the same memory."""

    __slots__ = ("_views", "array", "event", "tensor", "used")

    def __init__(self, words: int, pinned: bool, event: Any) -> None:
        self.tensor = torch.zeros(words, dtype=torch.int64, pin_memory=pinned)
        self.array: npt.NDArray[np.int64] = self.tensor.numpy()
        self.event = event
        self.used = False
        self._views: dict[tuple[int, int], DeviceViews] = {}

    def views(self, sections: Sections) -> DeviceViews:
        """The sections as host tensors."""
        return _kept(self._views, self.tensor, sections)


class StagingRing:
    """Host buffers in rotation, and the device buffer that they are copied to.

    On a device that is the host's own memory (``device.type == "cpu"`` in torch) nothing is copied: the views of the
    host buffer are the step's tensors. ``in_place`` False copies even there.
    """

    def __init__(self, device: Device, words: int, depth: int = 3, in_place: bool = True) -> None:
        self.device = device
        self.in_place = in_place and device.torch_device.type == "cpu"
        pinned = device.pins_memory and not self.in_place
        self._asynchronous = pinned
        self._ring = [HostBuffer(words, pinned, device.new_event() if pinned else None) for _ in range(depth)]
        self._next = 0
        self.base = (
            self._ring[0].tensor if self.in_place else torch.zeros(words, dtype=torch.int64, device=device.torch_device)
        )
        self._views: dict[tuple[int, int], DeviceViews] = {}

    @property
    def words(self) -> int:
        """Capacity of one buffer."""
        return int(self.base.numel())

    def acquire(self) -> HostBuffer:
        """The next host buffer; waits if the copy out of it has not run yet."""
        buffer = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if buffer.used and buffer.event is not None:
            buffer.event.synchronize()
        buffer.used = True
        return buffer

    def send(self, buffer: HostBuffer, words: int) -> torch.Tensor:
        """Copy the first ``words`` words to the device, in order with its work; returns the words as they lie there."""
        if self.in_place:
            return buffer.tensor
        self.base[:words].copy_(buffer.tensor[:words], non_blocking=self._asynchronous)
        if buffer.event is not None:
            buffer.event.record()
        return self.base

    def views(self, buffer: HostBuffer, sections: Sections) -> DeviceViews:
        """The sections as the device sees them. Off the host, their addresses depend on the sizes alone."""
        return buffer.views(sections) if self.in_place else _kept(self._views, self.base, sections)


def _kept(known: dict[tuple[int, int], DeviceViews], base: torch.Tensor, sections: Sections) -> DeviceViews:
    """Views are kept by size: steady decoding makes none."""
    key = (sections.tokens, sections.rows)
    views = known.get(key)
    if views is None:
        views = DeviceViews(base, sections)
        if len(known) >= _KEPT_VIEWS:
            known.clear()
        known[key] = views
    return views
