"""What the operators refuse, asked before they are chosen. Source: the operator documents in torch-npu's wheel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dougong.hal import AttentionQuery, Refusal
from dougong_ascend.layouts import LATENT, MAX_MERGED, NZ_BLOCK_TIMES_DIM

__all__ = ["fused_refusals", "latent_refusals", "nz_refusals"]

_LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_KV_LIMIT = 262144
"""Most keys of a row whose query is one token."""


def _common(query: AttentionQuery, dtypes: tuple[torch.dtype, ...]) -> Iterator[Refusal]:
    spec = query.spec
    if spec.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield Refusal(f"dtype {str(spec.dtype).removeprefix('torch.')}: the operator takes {names}", names)
    if spec.kv_dtype != spec.dtype:
        yield Refusal(f"a cache in {spec.kv_dtype} under queries in {spec.dtype}", "one dtype for both")
    if spec.softcap is not None:
        yield Refusal("the operator has no softcap", "no softcap")
    if spec.alibi:
        yield Refusal("ALiBi would need a bias of every query against every key", "no ALiBi")
    if query.batch_invariant:
        yield Refusal("the operator splits its work by what else is in the batch", "batch_invariant=False")


def fused_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against ``npu_fused_infer_attention_score`` over a cache with plain heads, or over K and V without a cache."""
    spec, block = query.spec, query.block_size
    found = list(_common(query, (torch.bfloat16, torch.float16)))
    if spec.latent:
        found.append(Refusal("a latent cache keeps its parts in planes of their own", f"layout {LATENT.name}"))
        return tuple(found)
    if spec.head_dim_v != spec.head_dim:
        found.append(Refusal(f"head_dim_v={spec.head_dim_v} beside head_dim={spec.head_dim}: K and V must be alike",
                             f"head_dim_v={spec.head_dim}"))  # fmt: skip
    if spec.head_dim % 16 or spec.head_dim > 512:
        nearest = min(512, -(-spec.head_dim // 16) * 16)
        found.append(Refusal(f"head_dim={spec.head_dim}: multiples of 16 up to 512", f"head_dim={nearest}"))
    if spec.num_heads > 256:
        found.append(Refusal(f"{spec.num_heads} query heads: at most 256", "256 heads, more ranks"))
    if spec.group_size > 64:
        found.append(Refusal(f"{spec.group_size} query heads per kv head: at most 64", "64"))
    if query.ragged:
        return tuple(found)
    if query.layout.name not in ("nhd", "hnd"):
        found.append(Refusal(f"KV layout {query.layout.name}", "nhd or hnd"))
    if block % 16 or not 16 <= block <= 512:
        nearest = min(512, max(16, round(block / 16) * 16))
        found.append(Refusal(f"block size {block}: multiples of 16 up to 512", f"{nearest}; 128 is fastest"))
    merged = spec.num_kv_heads * spec.head_dim
    if query.layout.name == "nhd" and merged > MAX_MERGED:
        found.append(Refusal(f"{merged} elements per token of the cache: at most {MAX_MERGED} with heads inside",
                             "layout hnd"))  # fmt: skip
    return tuple(found)


def latent_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against the fused operator with separate rope parts (MLA)."""
    spec = query.spec
    found = list(_common(query, (torch.bfloat16, torch.float16)))
    if not spec.latent or query.layout.name != LATENT.name:
        found.append(Refusal(f"not a latent cache in layout {LATENT.name}", f"latent, layout {LATENT.name}"))
    if (spec.head_dim, spec.head_dim_v) != (576, 512):
        found.append(Refusal(f"latent {spec.head_dim_v} + rope {spec.head_dim - spec.head_dim_v}", "512 + 64"))
    if spec.num_heads not in _LATENT_HEADS:
        nearest = min(_LATENT_HEADS, key=lambda heads: abs(heads - spec.num_heads))
        found.append(Refusal(f"{spec.num_heads} query heads: a power of two up to 128", str(nearest)))
    if query.block_size not in (16, 128):
        found.append(
            Refusal(f"block size {query.block_size} with a latent cache", "16" if query.block_size <= 72 else "128")
        )
    for asked, what in (
        (spec.lse, "LSE"), (spec.sinks, "sinks"), (spec.window is not None, "a window"), (not spec.causal, "no mask"),
        (query.ragged, "K and V without a cache"),
    ):  # fmt: skip
        if asked:
            found.append(Refusal(f"{what} with a latent cache", "causal attention over a paged cache"))
    return tuple(found)


def nz_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against ``_npu_paged_attention`` on 310P."""
    spec, block = query.spec, query.block_size
    found = list(_common(query, (torch.float16,)))
    for asked, what in (
        (spec.lse, "LSE"), (spec.sinks, "sinks"), (spec.window is not None, "a window"),
        (spec.latent, "a latent cache"), (query.ragged, "K and V without a cache"),
        (spec.head_dim_v != spec.head_dim, "a V of another width than K"),
    ):  # fmt: skip
        if asked:
            found.append(Refusal(f"{what} on 310P", "plain attention over a paged cache"))
    if spec.head_dim % 16 or spec.head_dim > 256:
        nearest = min(256, -(-spec.head_dim // 16) * 16)
        found.append(Refusal(f"head_dim={spec.head_dim}: multiples of 16 up to 256", f"head_dim={nearest}"))
    if query.layout.name != "nz16":
        found.append(Refusal(f"KV layout {query.layout.name} on 310P", "nz16"))
    largest = min(128, NZ_BLOCK_TIMES_DIM // max(1, spec.head_dim) // 16 * 16)
    if block % 16 or not 16 <= block <= largest:
        nearest = min(largest, max(16, round(block / 16) * 16))
        found.append(Refusal(f"block size {block} with head_dim={spec.head_dim}: multiples of 16 up to {largest}",
                             str(nearest)))  # fmt: skip
    return tuple(found)
