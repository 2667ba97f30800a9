"""``hccl`` in the twin: a process group under that name for NPU tensors, which sends them through host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dougong_ascend.twin.refusal import require

__all__ = ["HostStagedGroup", "register"]

#: What HCCL reduces.
_REDUCED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64)


class _Done(dist.Work):
    """A call that is over when it returns."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class HostStagedGroup(dist.ProcessGroup):
    """The collectives that the core calls. Like HCCL it takes contiguous tensors on the NPU, and nothing else."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._host = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        for tensor in tensors:
            _check("all_reduce", tensor)
            require(tensor.dtype in _REDUCED, "hccl all_reduce", f"{tensor.dtype} is not reduced")
        # Sums of 16-bit floats are kept in 32 bits, as on the device.
        wide = [tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu() for tensor in tensors]
        self._host.allreduce(wide, opts or dist.AllreduceOptions()).wait()
        for tensor, sums in zip(tensors, wide):
            tensor.copy_(sums.to(tensor.dtype))
        return _Done(tensors)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        for tensor in tensors:
            _check("broadcast", tensor)
        host = [_bytes(tensor) for tensor in tensors]
        self._host.broadcast(host, opts).wait()
        for tensor, data in zip(tensors, host):
            tensor.copy_(data.view(tensor.dtype).view(tensor.shape))
        return _Done(tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        for tensor in (*inputs, *(one for row in outputs for one in row)):
            _check("all_gather", tensor)
        for row, tensor in zip(outputs, inputs):
            data = _bytes(tensor)
            parts = [torch.empty_like(data) for _ in row]
            self._host.allgather([parts], [data], opts or dist.AllgatherOptions()).wait()
            for target, part in zip(row, parts):
                target.copy_(part.view(target.dtype).view(target.shape))
        return _Done(outputs)

    def barrier(self, opts: Any = None) -> Any:
        self._host.barrier(opts or dist.BarrierOptions()).wait()
        return _Done(None)


def _check(call: str, tensor: torch.Tensor) -> None:
    require(tensor.device.type == "npu", f"hccl {call}", f"a tensor on {tensor.device}: NPU tensors only")
    require(tensor.is_contiguous(), f"hccl {call}", "a tensor that is not contiguous")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().flatten().view(torch.uint8)


def register() -> None:
    """Make ``hccl`` a name that torch.distributed knows, as torch-npu does."""
    if "hccl" in dist.Backend.backend_list:
        return
    make: Callable[..., HostStagedGroup] = HostStagedGroup
    dist.Backend.register_backend("hccl", make, devices=["npu"])
