"""What each library's attention refuses, asked before it is chosen.

Sources: the checks in vLLM 0.26's FlashAttention, FlashAttention 3, FlashInfer 0.6.14 and torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dougong.hal import AttentionQuery, KVLayout, OneOf, Refusal

__all__ = ["FLASH_NHD", "INFER_HND", "INFER_NHD", "flash_refusals", "infer_refusals", "varlen_refusals"]

#: Larger pages may be fetched whole: then slots that nobody wrote take part, weighed with 0, and 0 times NaN is NaN.
FLASH_NHD = KVLayout("nhd", block_sizes=OneOf((16, 32)), default_block=16)
INFER_NHD = KVLayout("nhd", block_sizes=OneOf((16, 32, 64)), default_block=16)
INFER_HND = KVLayout("hnd", {"k": "b h n d", "v": "b h n d"}, OneOf((16, 32, 64)), 16)

#: Wider heads had faults of their own in both (strides of q, pages of V), and were not checked here.
_FLASH_DIMS = (64, 96, 128)
_INFER_DIMS = (64, 128)
_OTHER = "the triton provider"


def _common(query: AttentionQuery, capability: tuple[int, int], dims: tuple[int, ...]) -> Iterator[Refusal]:
    spec = query.spec
    if capability < (8, 0):
        yield Refusal(f"compute capability {capability[0]}.{capability[1]}", "8.0 or newer")
    if spec.dtype not in (torch.bfloat16, torch.float16):
        yield Refusal(f"dtype {spec.dtype}: bfloat16 or float16", "bfloat16")
    if spec.kv_dtype != spec.dtype:
        yield Refusal(f"a cache in {spec.kv_dtype} under queries in {spec.dtype}", _OTHER)
    if spec.head_dim not in dims or spec.head_dim_v != spec.head_dim:
        nearest = min(dims, key=lambda dim: abs(dim - spec.head_dim))
        listed = ", ".join(map(str, dims))
        yield Refusal(f"head dim {spec.head_dim}/{spec.head_dim_v}: one of {listed}, K and V alike", str(nearest))
    for asked, what in (
        (spec.latent, "a latent cache"), (spec.alibi, "ALiBi"), (query.batch_invariant, "batch invariance"),
        (spec.sinks, "sinks: they are taken in 16 bits, or not at all"),
        (spec.window is not None and not query.ragged,
         "a window over a cache: blocks behind it may hold anything, and the kernels weigh them with 0"),
        (query.strided, "a cache with gaps or swapped axes"),
    ):  # fmt: skip
        if asked:
            yield Refusal(what, _OTHER)


def _paged(query: AttentionQuery, *layouts: KVLayout) -> Iterator[Refusal]:
    if query.ragged:
        return
    layout = next((one for one in layouts if one.name == query.layout.name), None)
    if layout is None:
        yield Refusal(f"KV layout {query.layout.name}", layouts[0].name)
    elif not layout.block_sizes.allows(query.block_size):
        nearest = layout.block_sizes.nearest(query.block_size)
        yield Refusal(f"block size {query.block_size}: {layout.block_sizes}", str(nearest))


def flash_refusals(query: AttentionQuery, capability: tuple[int, int]) -> tuple[Refusal, ...]:
    """Against FlashAttention 2 and 3 with block tables."""
    return (*_common(query, capability, _FLASH_DIMS), *_paged(query, FLASH_NHD))


def infer_refusals(query: AttentionQuery, capability: tuple[int, int]) -> tuple[Refusal, ...]:
    """Against FlashInfer's batch wrappers."""
    found = [*_common(query, capability, _INFER_DIMS), *_paged(query, INFER_NHD, INFER_HND)]
    if query.spec.window is not None and not query.spec.causal:
        found.append(Refusal("a window without a causal mask", _OTHER))
    return tuple(found)


def varlen_refusals(query: AttentionQuery, capability: tuple[int, int]) -> tuple[Refusal, ...]:
    """Against torch's ``varlen_attn``, whose paged form wants pages of 256: keys of a cache are gathered first."""
    found = list(_common(query, capability, _FLASH_DIMS))
    spec = query.spec
    for asked, what in ((spec.softcap is not None, "softcap"), (spec.lse, "LSE: its shape differs between torches")):
        if asked:
            found.append(Refusal(what, _OTHER))
    return tuple(found)
