"""What runs the ops on AMD GPUs: the portable Triton kernels, and aiter's attention before them where it is."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dougong.plugins import KernelSpec
from dougong_rocm import CONTRACT

if TYPE_CHECKING:
    from dougong_rocm.device import RocmDevice

__all__ = ["kernel_specs"]


def kernel_specs(device: RocmDevice) -> list[KernelSpec]:
    """Every implementation on offer for ``device``."""
    from dougong_kernels.specs import kernel_specs as portable

    aiter = KernelSpec(
        op="attention",
        provider="aiter",
        abi=CONTRACT,
        target="dougong_rocm.aiter:AiterAttention",
        features=frozenset({"softcap", "noncausal", "ragged"}),
        layouts=("nhd",),
        dtypes=frozenset({"bfloat16", "float16"}),
        priority=50,
        graph="capture",
        graph_batches="decode",
        needs_host_lengths=True,
        unavailable="" if find_spec("aiter") else "aiter is not installed (pip install amd-aiter; gfx942, gfx950)",
    )
    return [aiter, *portable(device)]
