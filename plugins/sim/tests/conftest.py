"""The device exists once per process: it is installed before the first test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dougong_sim.device import SimDevice


@pytest.fixture(scope="session")
def device() -> SimDevice:
    return SimDevice(0)


@pytest.fixture
def limit() -> Iterator[int]:
    """Device 0 with 64 MiB above what is allocated now."""
    before = torch.sim.mem_get_info()[1]
    bytes_now = torch.sim.memory_reserved() + (64 << 20)
    torch.sim.set_memory_limit(bytes_now)
    yield 64 << 20
    torch.sim.set_memory_limit(before)
