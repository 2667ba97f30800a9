"""Whether the portable functional ops run on a device."""

from __future__ import annotations

import torch

from dougong.hal import Device, OpQuery, Refusal
from dougong_kernels.target import available

__all__ = ["supports"]


def supports(query: OpQuery, device: Device) -> tuple[Refusal, ...]:
    """Wherever Triton does: dtypes and layouts stand in the KernelSpecs."""
    missing = available(torch.device(device.torch_device))
    return (Refusal(missing),) if missing else ()
