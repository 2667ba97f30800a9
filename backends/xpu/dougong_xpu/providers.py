"""What runs the ops on Intel GPUs: Intel's attention where a library for it is installed, else the portable kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.plugins import KernelSpec
from dougong_xpu import CONTRACT, sdk

if TYPE_CHECKING:
    from dougong_xpu.device import XpuDevice

__all__ = ["kernel_specs"]

_FLOATS = frozenset({"bfloat16", "float16"})


def kernel_specs(device: XpuDevice) -> list[KernelSpec]:
    """Every implementation on offer for ``device``."""
    from dougong_kernels.specs import kernel_specs as portable

    graph = "none" if device.graphs is None else "capture"
    vllm = KernelSpec(
        op="attention",
        provider="vllm-xpu-kernels",
        abi=CONTRACT,
        target="dougong_xpu.flash:VllmAttention",
        features=frozenset({"window", "noncausal", "ragged", "kv_fp8_e4m3"}),
        layouts=("nhd",),
        dtypes=_FLOATS,
        priority=60,
        graph=graph,
        graph_batches="decode",
        unavailable=sdk.missing("vllm_xpu_kernels"),
    )
    sgl = KernelSpec(
        op="attention",
        provider="sgl-kernel-xpu",
        abi=CONTRACT,
        target="dougong_xpu.flash:SglAttention",
        features=frozenset({"noncausal"}),
        layouts=("nhd",),
        dtypes=_FLOATS,
        priority=50,
        graph=graph,
        graph_batches="decode",
        unavailable=sdk.missing("sgl_kernel"),
    )
    ipex = KernelSpec(
        op="attention",
        provider="intel-extension-for-pytorch",
        abi=CONTRACT,
        target="dougong_xpu.ipex:IpexAttention",
        layouts=("hnd",),
        dtypes=_FLOATS,
        priority=40,
        unavailable=sdk.missing("intel_extension_for_pytorch"),
    )
    return [vllm, sgl, ipex, *portable(device, graph=graph)]
