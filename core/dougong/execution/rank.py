"""A process that rank 0 started to run its share of the steps.

It reads its place (a pickled `Place`) from standard input and ends when rank 0 closes its runner, or is gone.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dougong.config import EngineConfig
from dougong.errors import EngineError

__all__ = ["Place", "join", "main", "start_ranks"]

_HOST = "127.0.0.1"
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """Which rank a process is, and where rank 0's store listens."""

    config: EngineConfig
    rank: int
    size: int
    port: int


def start_ranks(config: EngineConfig, size: int, devices: int) -> tuple[list[subprocess.Popen[bytes]], Any]:
    """Start ranks 1 … size-1 on this machine and wait until each has come up.

    ``devices``: how many the backend has; 0 where all ranks share the host.

    Raises:
        EngineError: a process ended before it joined.
    """
    store = dist.TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    processes = []
    for rank in range(1, size):
        own = replace(config, device_index=config.device_index + rank) if devices else config
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        processes.append(process)
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pickle.dump(Place(own, rank, size, store.port), pipe)
        except BrokenPipeError:
            pass  # it is gone; its exit code is reported below
    begun = time.monotonic()
    for rank, process in enumerate(processes, 1):
        while not store.check([f"rank {rank}"]):
            if process.poll() is not None or time.monotonic() - begun > _START_SECONDS:
                code = process.poll()
                for other in processes:
                    other.kill()
                    other.wait()
                raise EngineError(f"rank {rank} of {size} did not start (exit code {code}); its messages stand above.")
            time.sleep(0.02)
    return processes, store


def join(dist_backend: str, store: Any, rank: int, size: int) -> None:
    """Enter torch.distributed's default group."""
    dist.init_process_group(dist_backend, store=store, rank=rank, world_size=size)


def main() -> None:
    """Join, build the same runner as rank 0, and follow it to its end."""
    place: Place = pickle.load(sys.stdin.buffer)
    store = dist.TCPStore(_HOST, place.port, place.size, is_master=False, timeout=timedelta(seconds=_START_SECONDS))  # type: ignore[attr-defined]
    store.set(f"rank {place.rank}", "up")
    from dougong.execution.parallel import own_collectives
    from dougong.execution.runner import ModelRunner
    from dougong.hal import open_backend

    torch.set_num_threads(1)
    backend = open_backend(place.config.backend, index=place.config.device_index)
    join(backend.device.dist_backend, store, place.rank, place.size)
    runner = ModelRunner(place.config, backend=backend, collectives=own_collectives(backend))
    runner.follow()
    dist.destroy_process_group()
