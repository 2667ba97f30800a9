"""What runs the ops on Ascend NPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.plugins import ABI, KernelSpec

if TYPE_CHECKING:
    from dougong_ascend.device import AscendDevice

__all__ = ["kernel_specs"]

_OPS = ("rms_norm", "add_rms_norm", "silu_mul", "rope", "qk_norm_rope_write")


def kernel_specs(device: AscendDevice) -> list[KernelSpec]:
    """Every implementation on offer for ``device``."""
    ops = [
        KernelSpec(
            op=op, provider="npu", abi=ABI, target=f"dougong_ascend.ops:{op}",
            dtypes=frozenset({"float16", "bfloat16", "float32"}), priority=100, graph="capture",
        )
        for op in _OPS
    ]  # fmt: skip
    if device.is_310p:
        paged = KernelSpec(
            op="attention",
            provider="atb paged attention",
            abi=ABI,
            target="dougong_ascend.attention_310p:PagedAttention310P",
            features=frozenset({"noncausal"}),
            layouts=("nz16",),
            dtypes=frozenset({"float16"}),
            priority=100,
            needs_host_lengths=True,
        )
        # The fused norm, rotary and activation operators are documented for A2 and A3 only.
        write = KernelSpec(
            op="qk_norm_rope_write",
            provider="npu",
            abi=ABI,
            target="dougong_ascend.ops:qk_norm_rope_write_310p",
            layouts=("nz16",),
            dtypes=frozenset({"float16"}),
            priority=100,
        )
        return [paged, write]
    fused = KernelSpec(
        op="attention",
        provider="npu fused infer attention",
        abi=ABI,
        target="dougong_ascend.attention:FusedAttention",
        features=frozenset({"window", "sinks", "lse", "noncausal", "ragged"}),
        layouts=("nhd", "hnd"),
        dtypes=frozenset({"bfloat16", "float16"}),
        priority=100,
        graph="update",
        graph_batches="decode",
        needs_host_lengths=True,
    )
    latent = KernelSpec(
        op="attention",
        provider="npu fused infer attention (MLA)",
        abi=ABI,
        target="dougong_ascend.latent:LatentAttention",
        features=frozenset({"latent"}),
        layouts=("latent_rope",),
        dtypes=frozenset({"bfloat16", "float16"}),
        priority=100,
        graph="update",
        graph_batches="decode",
        needs_host_lengths=True,
    )
    return [fused, latent, *ops]
