"""Copies that do not wait are as late as a device may make them, so a missing wait shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dougong_sim.device import SimDevice


def event_wait(device: SimDevice) -> None:
    event = device.new_event()
    event.record()
    event.synchronize()


def poll(device: SimDevice) -> None:
    event = device.new_event()
    event.record()
    answers = [event.query(), event.query()]
    assert answers == [False, True]


@pytest.mark.parametrize(
    "wait",
    [
        event_wait,
        poll,
        SimDevice.synchronize,
        lambda device: torch.sim.current_stream().synchronize(),
        lambda device: torch.ones(1, device="sim").item(),
        lambda device: torch.ones(1, device="sim").cpu(),
    ],
)
def test_a_result_arrives_when_the_host_waits(device: SimDevice, wait: Callable[[SimDevice], object]) -> None:
    device.synchronize()
    source = torch.arange(4, device="sim")
    host = torch.zeros(4, dtype=torch.float32, pin_memory=True)
    host.copy_(source, non_blocking=True)
    source.fill_(9)  # later on the device: the copy has the values of its place in the order
    assert host.isnan().all()
    wait(device)
    assert host.tolist() == [0, 1, 2, 3]


def test_an_event_covers_what_came_before_it(device: SimDevice) -> None:
    early, late = (torch.zeros(2, pin_memory=True) for _ in range(2))
    early.copy_(torch.ones(2, device="sim"), non_blocking=True)
    event = device.new_event()
    event.record()
    late.copy_(torch.ones(2, device="sim"), non_blocking=True)
    event.synchronize()
    assert early.tolist() == [1, 1]
    assert late.isnan().all()
    device.synchronize()
    assert late.tolist() == [1, 1]


def test_a_buffer_that_is_used_again_too_soon(device: SimDevice) -> None:
    staging = torch.zeros(3, pin_memory=True)
    there = staging.to("sim", non_blocking=True)
    staging[1] = 5
    with pytest.raises(RuntimeError, match=r"pinned memory of shape .* was changed"):
        device.synchronize()
    device.synchronize()  # said once
    there.copy_(staging, non_blocking=True)
    event_wait(device)
    staging.fill_(7)
    device.synchronize()
    assert there.tolist() == [0, 5, 0]


def test_to_the_host_and_back_keeps_the_order(device: SimDevice) -> None:
    pinned = torch.zeros(3, pin_memory=True)
    pinned.copy_(torch.ones(3, device="sim"), non_blocking=True)
    assert pinned.to("sim", non_blocking=True).tolist() == [1, 1, 1]


def test_a_program_that_never_waits_holds_no_memory_without_bound() -> None:
    x = torch.ones(1, device="sim")
    buffers = [torch.zeros(1, pin_memory=True).copy_(x, non_blocking=True) for _ in range(5000)]
    assert buffers[0].item() == 1
    assert buffers[-1].isnan()
    torch.sim.synchronize()
    assert buffers[-1].item() == 1
