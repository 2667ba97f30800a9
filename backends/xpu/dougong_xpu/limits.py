"""What each library's attention refuses, asked before it is chosen.

Sources: the checks in vllm-xpu-kernels and sgl-kernel-xpu of August 2026, and the documents of
intel-extension-for-pytorch 2.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dougong.hal import AttentionQuery, KVLayout, Multiple, OneOf, Refusal

__all__ = ["IPEX_HND", "SGL_NHD", "VLLM_NHD", "ipex_refusals", "sgl_refusals", "vllm_refusals"]

#: vllm-xpu-kernels: pages of 64, or more of them at once.
VLLM_NHD = KVLayout("nhd", block_sizes=Multiple(64), default_block=64)
#: sgl-kernel-xpu: its decode kernel exists for these two pages.
SGL_NHD = KVLayout("nhd", block_sizes=OneOf((64, 128)), default_block=64)
IPEX_HND = KVLayout("hnd", {"k": "b h n d", "v": "b h n d"}, OneOf((16, 32, 64)), 16)

_HEAD_DIMS = (64, 96, 128, 192, 256)
_OTHER = "the triton provider"


def _common(query: AttentionQuery, layout: KVLayout, head_dims: tuple[int, ...]) -> Iterator[Refusal]:
    spec = query.spec
    if spec.dtype not in (torch.bfloat16, torch.float16):
        yield Refusal(f"dtype {spec.dtype}: bfloat16 or float16", "bfloat16")
    if spec.head_dim not in head_dims or spec.head_dim_v != spec.head_dim:
        nearest = min(head_dims, key=lambda dim: abs(dim - spec.head_dim))
        dims = ", ".join(map(str, head_dims))
        yield Refusal(f"head dim {spec.head_dim}/{spec.head_dim_v}: one of {dims}, K and V alike", str(nearest))
    yield from _asked(
        ("a latent cache", spec.latent), ("ALiBi", spec.alibi), ("batch invariance", query.batch_invariant),
        ("softcap: the kernels take it and leave it out", spec.softcap is not None),
        ("LSE: decodes leave it unwritten", spec.lse),
        ("sinks: they are taken in the queries' 16 bits only", spec.sinks),
        ("a window without a causal mask", spec.window is not None and not spec.causal),
    )  # fmt: skip
    if query.ragged:
        return
    if spec.window is not None:
        yield Refusal("a window over a cache: what lies behind it may be anything, and is weighed with 0", _OTHER)
    if query.layout.name != layout.name:
        yield Refusal(f"KV layout {query.layout.name}", layout.name)
    if not layout.block_sizes.allows(query.block_size):
        nearest = layout.block_sizes.nearest(query.block_size)
        yield Refusal(f"block size {query.block_size}: {layout.block_sizes}", str(nearest))


def _asked(*wanted: tuple[str, bool]) -> Iterable[Refusal]:
    return [Refusal(what, _OTHER) for what, asked in wanted if asked]


def vllm_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against ``flash_attn_varlen_func`` of vllm-xpu-kernels."""
    spec = query.spec
    found = list(_common(query, VLLM_NHD, _HEAD_DIMS))
    if spec.kv_dtype not in (spec.dtype, torch.float8_e4m3fn):
        found.append(Refusal(f"a cache in {spec.kv_dtype}", f"{spec.dtype} or float8_e4m3fn"))
    return tuple(found)


def sgl_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against ``flash_attn_with_kvcache`` of sgl-kernel-xpu."""
    spec = query.spec
    found = list(_common(query, SGL_NHD, _HEAD_DIMS))
    if spec.kv_dtype != spec.dtype:
        found.append(Refusal(f"a cache in {spec.kv_dtype}", str(spec.dtype)))
    if spec.group_size > 16:
        found.append(Refusal(f"{spec.group_size} query heads per kv head: at most 16", "16"))
    if query.ragged:
        found.append(Refusal("K and V without a cache", _OTHER))
    return tuple(found)


def ipex_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against ``PagedAttention`` of intel-extension-for-pytorch 2.8."""
    spec = query.spec
    found = list(_common(query, IPEX_HND, (64, 80, 96, 112, 128, 256)))
    if spec.kv_dtype != spec.dtype:
        found.append(Refusal(f"a cache in {spec.kv_dtype}", str(spec.dtype)))
    found += _asked(("no mask: not supported yet, say its documents", not spec.causal),
                    ("K and V without a cache", query.ragged))  # fmt: skip
    return tuple(found)
