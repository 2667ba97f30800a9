"""What a backend registers so that its device uses the portable Triton kernels."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dougong.plugins import KernelSpec
from dougong_kernels import CONTRACT

if TYPE_CHECKING:
    from dougong.hal import Device

__all__ = ["FEATURES", "PROVIDER", "kernel_specs"]

PROVIDER = "triton"
FEATURES = frozenset(
    {
        "window",
        "softcap",
        "alibi",
        "sinks",
        "lse",
        "noncausal",
        "dv",
        "latent",
        "ragged",
        "strided",
        "kv_int8",
        "kv_fp8_e4m3",
        "kv_fp8_e4m3fnuz",
    }
)
LAYOUTS = ("nhd", "hnd", "x_packed")
_OPS = {
    "rms_norm": "pointwise",
    "add_rms_norm": "pointwise",
    "silu_mul": "pointwise",
    "gelu_tanh_mul": "pointwise",
    "merge_lse": "pointwise",
    "rope": "write",
    "qk_norm_rope_write": "write",
    "sample": "draw",
}


def kernel_specs(device: Device, *, priority: int = 0, graph: str = "capture") -> tuple[KernelSpec, ...]:
    """The specs of every op here; a vendor's own kernels take a higher priority.

    ``graph`` is "capture" where the device can record graphs. Needs no Triton: without it each spec says so.
    """
    unavailable = "" if find_spec("triton") else "Triton is not installed"
    dtypes = frozenset({"bfloat16", "float16", "float32"})
    specs = [
        KernelSpec(
            op="attention",
            provider=name,
            abi=CONTRACT,
            target=f"dougong_kernels.attention:{cls}",
            features=FEATURES,
            layouts=LAYOUTS,
            dtypes=dtypes,
            priority=rank,
            graph=graph,
            batch_invariant=invariant,
            unavailable=unavailable,
        )
        for name, cls, rank, invariant in (
            (PROVIDER, "TritonAttention", priority, False),
            (f"{PROVIDER} batch-invariant", "BatchInvariantTritonAttention", priority - 1, True),
        )
    ]
    specs += [
        KernelSpec(
            op=op,
            provider=PROVIDER,
            abi=CONTRACT,
            target=f"dougong_kernels.ops.{module}:{op}",
            layouts=LAYOUTS if op == "qk_norm_rope_write" else (),
            dtypes=dtypes,
            priority=priority,
            graph=graph,
            batch_invariant=True,
            unavailable=unavailable,
        )
        for op, module in _OPS.items()
    ]
    specs.append(
        KernelSpec(
            op="linear",
            provider=PROVIDER,
            abi=CONTRACT,
            target="dougong_kernels.ops.gemv:TritonLinear",
            dtypes=frozenset({"bfloat16", "float16"}),
            priority=priority,
            graph=graph,
            unavailable=unavailable,
        )
    )
    return tuple(specs)
