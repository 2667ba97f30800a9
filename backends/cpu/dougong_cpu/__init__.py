"""The CPU backend of dougong: paged attention, fused ops and low-bit products in C++, chosen for the instruction set
that the machine has.

Import-light: this module names its classes by string; ``library`` loads the C++ only when a kernel is asked for.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import Any

from dougong.plugins import BackendSpec, KernelSpec, Probe, hookimpl

__all__ = ["dougong_backends", "dougong_kernels"]

__version__ = "0.1.0"

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)

_FLOATS = frozenset({"float32", "bfloat16", "float16"})
_ATTENTION = frozenset(
    {
        "window", "softcap", "alibi", "sinks", "lse", "noncausal", "dv", "latent", "ragged", "strided", "kv_int8",
        "kv_fp8_e4m3",
    }
)  # fmt: skip
_OPS = ("rms_norm", "add_rms_norm", "silu_mul", "gelu_tanh_mul", "rope", "qk_norm_rope_write", "argmax")


def _probe() -> Probe:
    return Probe(ok=True, devices=(f"{platform.machine()}, {os.cpu_count()} cores",))


@hookimpl
def dougong_backends() -> Iterable[BackendSpec]:
    yield BackendSpec(
        name="cpu",
        abi=CONTRACT,
        target="dougong_cpu.device:CpuDevice",
        probe=_probe,
        score=0,
        description="C++ kernels for AVX-512, AVX2, SSE and NEON",
    )


@hookimpl
def dougong_kernels(device: Any, backend: str) -> Iterable[KernelSpec]:
    if backend != "cpu":
        return
    from dougong_cpu.library import unavailable_reason

    reason = unavailable_reason()
    yield KernelSpec(
        op="attention",
        provider="cpu-native",
        abi=CONTRACT,
        target="dougong_cpu.attention:CpuAttention",
        features=_ATTENTION,
        layouts=("nhd", "hnd"),
        dtypes=_FLOATS,
        priority=100,
        batch_invariant=True,
        unavailable=reason,
    )
    yield KernelSpec(
        op="linear",
        provider="cpu-native",
        abi=CONTRACT,
        target="dougong_cpu.linear:CpuLinear",
        features=frozenset({"int8", "int4"}),
        dtypes=_FLOATS,
        priority=100,
        batch_invariant=False,
        unavailable=reason,
    )
    for op in _OPS:
        yield KernelSpec(
            op=op,
            provider="cpu-native",
            abi=CONTRACT,
            target=f"dougong_cpu.ops:{op}",
            layouts=("nhd", "hnd") if op == "qk_norm_rope_write" else (),
            dtypes=_FLOATS,
            priority=100,
            batch_invariant=True,
            unavailable=reason,
        )
