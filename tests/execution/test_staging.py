"""Pinned staging and results on their way back, on a device whose copies run when its events are waited for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from execution_harness import HostDevice

from dougong.execution.staging import StagingRing
from dougong.execution.transfer import Transfer


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record(self) -> None:
        self.log.append(f"record {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"wait {self.name}")


class Stream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_event(self, event: Event) -> None:
        self.log.append(f"side stream behind {event.name}")


class Far(HostDevice):
    """A device that pins; its tensors have no data."""

    pins_memory = True

    def __init__(self, sides: bool = False) -> None:
        super().__init__()
        self.torch_device = torch.device("meta")
        self.log: list[str] = []
        self.events = 0
        self.sides = sides

    def new_stream(self) -> Any:
        return Stream(self.log) if self.sides else None

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        if stream is not None:
            self.log.append("on the side stream")
        yield
        if stream is not None:
            self.log.append("on the compute stream")

    def new_event(self) -> Any:
        self.events += 1
        return Event(self.log, f"e{self.events - 1}")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was asked to be pinned; this torch has nothing to pin for."""
    asked: list[bool] = []

    def plain(make: Any) -> Any:
        def made(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            if more.get("device") is None:
                asked.append(pin_memory)
            return make(*size, **more)

        return made

    monkeypatch.setattr(torch, "zeros", plain(torch.zeros))
    monkeypatch.setattr(torch, "empty", plain(torch.empty))
    return asked


def test_a_pinned_buffer_is_written_again_only_after_its_copy(pinned: list[bool]) -> None:
    device = Far()
    ring = StagingRing(device, words=8, depth=2)
    assert pinned == [True, True]
    taken = []
    for _ in range(3):
        buffer = ring.acquire()
        taken.append(buffer)
        ring.send(buffer, 4)
    assert taken[0] is taken[2] is not taken[1]
    # The third step takes the first one's buffer: it waits for that copy, and for no later one.
    assert device.log == ["record e0", "record e1", "wait e0", "record e0"]


def test_without_pinned_memory_copies_are_synchronous_and_nothing_is_waited_for(pinned: list[bool]) -> None:
    device = Far()
    device.pins_memory = False
    ring = StagingRing(device, words=8, depth=2)
    for _ in range(3):
        ring.send(ring.acquire(), 4)
    assert pinned == [False, False] and device.log == []


def test_on_the_host_the_steps_tensors_are_the_buffers_own() -> None:
    ring = StagingRing(HostDevice(), words=8)
    buffer = ring.acquire()
    assert ring.send(buffer, 4) is buffer.tensor


@pytest.fixture
def logged(pinned: list[bool], monkeypatch: pytest.MonkeyPatch) -> Callable[[Far], None]:
    """Have copies told in a device's log."""
    copied = torch.Tensor.copy_

    def watch(device: Far) -> None:
        def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            device.log.append(f"copy {'asynchronously' if non_blocking else 'and wait'}")
            return self if source.is_meta else copied(self, source)

        monkeypatch.setattr(torch.Tensor, "copy_", copy)

    return watch


def test_results_are_waited_for_by_an_event_behind_their_copies_and_once(
    pinned: list[bool], logged: Callable[[Far], None]
) -> None:
    device = Far()
    logged(device)
    copies = Transfer(device).to_host([torch.zeros(3, device="meta"), torch.zeros(2, device="meta")])
    assert device.log == ["copy asynchronously", "copy asynchronously", "record e0"] and pinned[-2:] == [True, True]
    assert [len(one) for one in copies.get()] == [3, 2] and device.log[-1] == "wait e0"
    copies.get()
    assert device.log.count("wait e0") == 1


def test_results_go_out_on_a_side_stream_behind_what_computes_them_and_live_until_they_have_arrived(
    logged: Callable[[Far], None],
) -> None:
    device = Far(sides=True)
    logged(device)
    transfer = Transfer(device)
    result = torch.zeros(3, device="meta")
    alive = weakref.ref(result)
    copies = transfer.to_host([result])
    del result
    assert device.log == [
        "record e0", "side stream behind e0", "on the side stream", "copy asynchronously", "record e1",
        "on the compute stream",
    ]  # fmt: skip
    assert alive() is not None, "its memory may be given to the next step while it is still being copied"
    copies.get()
    assert device.log[-1] == "wait e1" and alive() is None


def test_what_is_large_goes_out_in_order_and_holds_no_memory(logged: Callable[[Far], None]) -> None:
    device = Far(sides=True)
    logged(device)
    large = torch.zeros(3, device="meta")
    alive = weakref.ref(large)
    copies = Transfer(device).to_host([large], aside=False)
    del large
    assert device.log == ["copy asynchronously", "record e0"] and alive() is None
    copies.get()


def test_a_stream_that_waits_for_no_events_is_not_used(
    logged: Callable[[Far], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Far()
    logged(device)
    monkeypatch.setattr(device, "new_stream", object, raising=False)
    Transfer(device).to_host([torch.zeros(3, device="meta")]).get()
    assert device.log == ["copy asynchronously", "record e0", "wait e0"]


def test_on_the_host_results_are_there_at_once() -> None:
    tensor = torch.arange(3)
    assert Transfer(HostDevice()).to_host([tensor]).get()[0] is tensor
    assert Transfer(HostDevice()).to_device(np.arange(3)).tolist() == [0, 1, 2]
