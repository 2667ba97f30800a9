"""What the operators refuse, asked before they are chosen. Source: the operator documents in torch-npu's wheel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dougong.hal import AttentionQuery, Refusal
from dougong_ascend.layouts import LATENT, LATENT_NZ, MAX_MERGED, NZ_BLOCK_TIMES_DIM

__all__ = ["MOST_KEYS", "fused_refusals", "gathered_refusals", "latent_refusals", "nz_refusals"]

_LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_KEYS = 262144
"""Most keys of a row whose query is one token."""


def _common(query: AttentionQuery, dtypes: tuple[torch.dtype, ...], *, int8: bool = False) -> Iterator[Refusal]:
    spec = query.spec
    if spec.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield Refusal(f"dtype {str(spec.dtype).removeprefix('torch.')}: the operator takes {names}", names)
    if spec.kv_dtype != spec.dtype and not (int8 and spec.kv_dtype == torch.int8):
        nearest = "one dtype for both, or int8" if int8 else "one dtype for both"
        yield Refusal(f"a cache in {spec.kv_dtype} under queries in {spec.dtype}", nearest)
    if spec.softcap is not None:
        yield Refusal("the operator has no softcap", "no softcap")
    if spec.alibi:
        yield Refusal("ALiBi would need a bias of every query against every key", "no ALiBi")
    if query.batch_invariant:
        yield Refusal("the operator splits its work by what else is in the batch", "batch_invariant=False")


def fused_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against ``npu_fused_infer_attention_score`` over a cache with plain heads, or over K and V without a cache."""
    found = list(_paged_refusals(query))
    if query.spec.kv_dtype == torch.int8 and query.block_size % 32 and not query.ragged:
        found.append(Refusal(f"block size {query.block_size} with an int8 cache: multiples of 32", "128"))
    return tuple(found)


def gathered_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    """Against the same, with every row's keys gathered first: for what the paged one refuses alone."""
    if query.spec.kv_dtype != torch.int8:
        return (Refusal("gathering a cache that is not int8", "npu fused infer attention"),)
    return _paged_refusals(query)


def _paged_refusals(query: AttentionQuery) -> tuple[Refusal, ...]:
    spec, block = query.spec, query.block_size
    found = list(_common(query, (torch.bfloat16, torch.float16), int8=not query.ragged))
    if (query.max_kv_len or 0) > MOST_KEYS:
        found.append(Refusal(f"{query.max_kv_len} keys under one query: at most {MOST_KEYS}", str(MOST_KEYS)))
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


def latent_refusals(query: AttentionQuery, *, tiled: bool = False) -> tuple[Refusal, ...]:
    """Against the fused operator with separate rope parts (MLA); ``tiled``: over planes in tiles (NZ)."""
    spec = query.spec
    layout = LATENT_NZ if tiled else LATENT
    heads = _LATENT_HEADS[:-1] if tiled else _LATENT_HEADS  # of 128 a token is too wide for this order of axes
    found = list(_common(query, (torch.bfloat16, torch.float16)))
    if not spec.latent or query.layout.name != layout.name:
        found.append(Refusal(f"not a latent cache in layout {layout.name}", f"latent, layout {layout.name}"))
    if (spec.head_dim, spec.head_dim_v) != (576, 512):
        found.append(Refusal(f"latent {spec.head_dim_v} + rope {spec.head_dim - spec.head_dim_v}", "512 + 64"))
    if spec.num_heads not in heads:
        nearest = min(heads, key=lambda count: abs(count - spec.num_heads))
        found.append(Refusal(f"{spec.num_heads} query heads: a power of two up to {heads[-1]}", str(nearest)))
    if not layout.block_sizes.allows(query.block_size):
        near = layout.block_sizes.nearest(query.block_size)
        found.append(Refusal(f"block size {query.block_size} with a latent cache in {layout.name}", str(near)))
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
