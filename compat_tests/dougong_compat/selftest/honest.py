"""The honest backends as a plugin: ``honest-eager``, ``honest-tiled``, ``honest-split``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dougong.plugins import ABI, BackendSpec, KernelSpec, hookimpl
from dougong_compat.selftest.recorder import HostGraphs
from dougong_compat.selftest.reference_backend import HostDevice

__all__ = ["EagerDevice", "SplitDevice", "TiledDevice", "dougong_backends", "dougong_kernels"]

_KERNELS = "dougong_compat.selftest.kernels"
_FEATURES = frozenset(
    {
        "window", "softcap", "alibi", "sinks", "lse", "noncausal", "dv", "strided", "kv_int8", "kv_fp8_e4m3",
        "kv_fp8_e5m2",
    }
)  # fmt: skip


class EagerDevice(HostDevice):
    provider = "eager"
    #: Its graphs record attention and cache writes: no engine can capture a step in one.
    partial_graphs = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.graphs = HostGraphs()


class TiledDevice(EagerDevice):
    provider = "tiled"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)


class SplitDevice(EagerDevice):
    provider = "split"
    dtypes = (torch.bfloat16, torch.float32, torch.float16)


@hookimpl
def dougong_backends() -> Iterable[BackendSpec]:
    for name in ("eager", "tiled", "split"):
        yield BackendSpec(
            name=f"honest-{name}", abi=ABI, target=f"dougong_compat.selftest.honest:{name.title()}Device", score=-100
        )


@hookimpl
def dougong_kernels(device: Any) -> Iterable[KernelSpec]:
    provider = getattr(device, "provider", None)
    if not isinstance(device, EagerDevice) or provider is None:
        return
    features = _FEATURES | {"ragged", "latent"} if provider == "eager" else _FEATURES
    yield KernelSpec(
        op="attention", provider=provider, abi=ABI, target=f"{_KERNELS}:{provider.title()}Kernel", features=features,
        layouts=("nhd", "hnd"), priority=10, graph="capture", batch_invariant=True,
    )  # fmt: skip
    for op in ("merge_lse", "copy_blocks"):
        yield KernelSpec(op=op, provider=provider, abi=ABI, target=f"{_KERNELS}:{op}", priority=10)
