"""What runs the ops on NVIDIA GPUs: the portable Triton kernels, and libraries' kernels where they are installed.

The portable kernels come first: they are measured, and passed the conformance suite on a GPU. The libraries wait to be
asked for by name (``attention_provider=``); "triton + flash-attention" gives FlashAttention 3 the long prompts alone,
where it is measured ahead of Triton's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.plugins import KernelSpec
from dougong_cuda import CONTRACT, sdk

if TYPE_CHECKING:
    from dougong_cuda.device import CudaDevice

__all__ = ["kernel_specs"]

_FLOATS = frozenset({"bfloat16", "float16"})


def kernel_specs(device: CudaDevice) -> list[KernelSpec]:
    """Every implementation on offer for ``device``."""
    from dougong_kernels.specs import kernel_specs as portable

    flash, infer = sdk.missing("flash"), sdk.missing("flashinfer")
    features = frozenset({"softcap", "lse", "noncausal", "ragged", "window"})
    return [
        KernelSpec(
            op="attention",
            provider="triton + flash-attention",
            abi=CONTRACT,
            target="dougong_cuda.flash:LongPromptAttention",
            features=features,
            layouts=("nhd",),
            dtypes=_FLOATS,
            priority=-5,
            graph="capture",
            unavailable=flash,
        ),
        *portable(device),
        KernelSpec(
            op="attention",
            provider="flash-attention",
            abi=CONTRACT,
            target="dougong_cuda.flash:FlashAttention",
            features=features,
            layouts=("nhd",),
            dtypes=_FLOATS,
            priority=-10,
            graph="capture",
            graph_batches="decode",
            unavailable=flash,
        ),
        KernelSpec(
            op="attention",
            provider="flashinfer",
            abi=CONTRACT,
            target="dougong_cuda.flash_infer:FlashInferAttention",
            features=features,
            layouts=("nhd", "hnd"),
            dtypes=_FLOATS,
            priority=-20,
            needs_host_lengths=True,
            unavailable=infer,
        ),
        KernelSpec(
            op="attention",
            provider="torch varlen",
            abi=CONTRACT,
            target="dougong_cuda.varlen:VarlenAttention",
            features=features - {"softcap", "lse"},
            dtypes=_FLOATS,
            priority=-30,
            needs_host_lengths=True,
        ),
        KernelSpec(
            op="linear",
            provider="torch fp8",
            abi=CONTRACT,
            target="dougong_cuda.fp8:Fp8Linear",
            features=frozenset({"fp8"}),
            dtypes=frozenset({"bfloat16"}),
            priority=-10,
            graph="capture",
            unavailable=_triton(),
        ),
    ]


def _triton() -> str:
    from importlib.util import find_spec

    return "" if find_spec("triton") else "Triton is not installed"
