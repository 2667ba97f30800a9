"""What runs the ops on Ascend NPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dougong.plugins import KernelSpec
from dougong_ascend import CONTRACT

if TYPE_CHECKING:
    from dougong_ascend.device import AscendDevice

__all__ = ["kernel_specs"]

_OPS = ("rms_norm", "add_rms_norm", "silu_mul", "rope", "qk_norm_rope_write")


def kernel_specs(device: AscendDevice) -> list[KernelSpec]:
    """Every implementation on offer for ``device``."""
    ops = [
        KernelSpec(
            op=op, provider="npu", abi=CONTRACT, target=f"dougong_ascend.ops:{op}",
            dtypes=frozenset({"float16", "bfloat16", "float32"}), priority=100, graph="capture",
        )
        for op in _OPS
    ]  # fmt: skip
    if device.is_310p:
        paged = KernelSpec(
            op="attention",
            provider="atb paged attention",
            abi=CONTRACT,
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
            abi=CONTRACT,
            target="dougong_ascend.ops:qk_norm_rope_write_310p",
            layouts=("nz16",),
            dtypes=frozenset({"float16"}),
            priority=100,
        )
        return [paged, write]
    fused = KernelSpec(
        op="attention",
        provider="npu fused infer attention",
        abi=CONTRACT,
        target="dougong_ascend.attention:FusedAttention",
        features=frozenset({"window", "sinks", "lse", "noncausal", "ragged", "kv_int8"}),
        layouts=("nhd", "hnd"),
        dtypes=frozenset({"bfloat16", "float16"}),
        priority=100,
        graph="update",
        graph_batches="decode",
        needs_host_lengths=True,
    )
    gathered = replace(
        fused,
        provider="npu fused infer attention (gathered)",
        target="dougong_ascend.attention:GatheredAttention",
        features=frozenset({"window", "sinks", "lse", "noncausal", "kv_int8"}),
        priority=80,
        graph="none",
    )
    latent = KernelSpec(
        op="attention",
        provider="npu fused infer attention (MLA)",
        abi=CONTRACT,
        target="dougong_ascend.latent:LatentAttention",
        features=frozenset({"latent"}),
        layouts=("latent_rope",),
        dtypes=frozenset({"bfloat16", "float16"}),
        priority=100,
        graph="update",
        graph_batches="decode",
        needs_host_lengths=True,
    )
    tiled = replace(
        latent,
        provider="npu fused infer attention (MLA, NZ)",
        target="dougong_ascend.latent:TiledLatentAttention",
        layouts=("latent_rope_nz16",),
        priority=90,  # for those who ask for it: attention_provider
    )
    return [fused, gathered, latent, tiled, *ops]
