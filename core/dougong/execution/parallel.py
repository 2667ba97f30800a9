"""Several ranks that share one model: rank 0 drives, the others run the same steps.

Rank 0 turns each plan into a `StepDelta` and sends it; every rank then stages, runs and samples alike, because
sampling is deterministic. The ranks are processes that rank 0 starts on this machine, or those that torchrun started:
then a rank other than 0 serves inside the runner's constructor, and its process ends when rank 0 closes the runner.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.execution.rank import join, start_ranks
from dougong.hal import Backend, Collectives, SingleRank, open_backend
from dougong.plugins import Plugins, load_plugins

__all__ = ["STOP", "WARM_UP", "Ranks", "open_ranks", "own_collectives"]

#: What rank 0 sends besides steps.
WARM_UP, STOP = "warm up", "stop"

#: Bytes of the first message: an ordinary step fits, a long prompt's tokens follow in a second one.
_FIRST = 4096
_JOIN_SECONDS = 20.0
#: Rank 0 may be idle for long.
_PATIENCE = timedelta(days=365)


class Ranks:
    """The ranks of one model as one of them sees them.

    Args:
        collectives: communication of the model itself.
        processes: those that this one started.
        owns_group: whether closing ends torch.distributed.
        served: whether this rank follows rank 0 from its constructor on (torchrun).
    """

    def __init__(
        self,
        collectives: Collectives,
        *,
        processes: list[subprocess.Popen[bytes]] | None = None,
        owns_group: bool = False,
        served: bool = False,
    ) -> None:
        self.collectives = collectives
        self.rank, self.size = collectives.rank, collectives.size
        self._processes = processes or []
        self._owns_group = owns_group
        self.served = served
        self._control: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.size > 1 else None
        self._closed = False
        if self._processes:
            atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def alone(self) -> bool:
        return self.size == 1

    def smallest(self, numbers: list[int]) -> list[int]:
        """Each number's smallest value over the ranks; all ranks call it."""
        if self.alone:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._control)
        return tensor.tolist()

    def send(self, message: Any) -> None:
        """Rank 0 to all others; in the order of the calls."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        first = torch.zeros(_FIRST, dtype=torch.uint8)
        head = len(data).to_bytes(8, "little") + data[: _FIRST - 8]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        dist.broadcast(first, 0, group=self._control)
        if len(data) > _FIRST - 8:
            dist.broadcast(torch.frombuffer(bytearray(data[_FIRST - 8 :]), dtype=torch.uint8), 0, group=self._control)

    def receive(self) -> Any:
        """The next message from rank 0, STOP where it is gone; waits for it."""
        first = torch.zeros(_FIRST, dtype=torch.uint8)
        try:
            dist.broadcast(first, 0, group=self._control)
        except RuntimeError:
            return STOP  # rank 0 is gone
        head = first.numpy().tobytes()
        length = int.from_bytes(head[:8], "little")
        data = head[8 : 8 + length]
        if length > _FIRST - 8:
            rest = torch.zeros(length - (_FIRST - 8), dtype=torch.uint8)
            dist.broadcast(rest, 0, group=self._control)
            data += rest.numpy().tobytes()
        return pickle.loads(data)

    def close(self) -> None:
        """Rank 0 tells the others to stop and waits for the processes that it started."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.rank == 0 and not self.alone:
                self.send(STOP)
        except RuntimeError:
            pass  # a rank is gone already
        for process in self._processes:
            try:
                process.wait(_JOIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _close_at_exit(reference: weakref.ref[Ranks]) -> None:
    ranks = reference()
    if ranks is not None:
        ranks.close()


def open_ranks(
    config: EngineConfig, plugins: Plugins | None, backend: Backend | None, collectives: Collectives | None
) -> tuple[Ranks, Backend]:
    """This process's place among the ranks, and its device.

    Args:
        collectives: made already: every rank has made its own and calls this at the same time. None: one rank, or
            as many as ``config.tensor_parallel_size`` says, those of torchrun or processes that are started here.

    Raises:
        ConfigError: torchrun started another number of ranks, or there are fewer devices than ranks.
        BackendNotFoundError, PluginError: as `open_backend`.
    """
    size = config.tensor_parallel_size
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and collectives is None and size > 1
    rank = int(os.environ["RANK"]) if under_torchrun else 0
    if under_torchrun and int(os.environ["WORLD_SIZE"]) != size:
        raise ConfigError(
            f"tensor_parallel_size={size}, but torchrun started {os.environ['WORLD_SIZE']} ranks: start as many."
        )
    if backend is None:
        plugins = load_plugins() if plugins is None else plugins
        backend = open_backend(config.backend, index=config.device_index, plugins=plugins)
        if size > 1 and collectives is None:
            count = _device_count(backend)
            if count and config.device_index + size > count:
                raise ConfigError(
                    f"tensor_parallel_size={size} from device {config.device_index} on: backend {backend.name!r} has "
                    f"{count} devices here. Lower tensor_parallel_size."
                )
            local = int(os.environ["LOCAL_RANK"]) if under_torchrun else 0
            if count and local:
                backend = open_backend(config.backend, index=config.device_index + local, plugins=plugins)
    if collectives is not None:
        return Ranks(collectives), backend
    if size == 1:
        return Ranks(SingleRank()), backend
    if under_torchrun:
        owns = not dist.is_initialized()
        if owns:
            dist.init_process_group(backend.device.dist_backend)
        return Ranks(own_collectives(backend), owns_group=owns, served=rank > 0), backend
    processes, store = start_ranks(config, size, _device_count(backend))
    join(backend.device.dist_backend, store, 0, size)
    return Ranks(own_collectives(backend), processes=processes, owns_group=True), backend


def own_collectives(backend: Backend) -> Collectives:
    """The device's own, where it brings some."""
    make = getattr(backend.device, "collectives", None)
    made: Collectives = Collectives() if make is None else make()
    return made


def _device_count(backend: Backend) -> int:
    """Devices of this kind; 0 for the host, which all ranks share."""
    device = backend.device
    return 0 if device.torch_device.type == "cpu" else int(device.module.device_count())
