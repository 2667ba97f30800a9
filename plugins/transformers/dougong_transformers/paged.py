"""Attention over transformers' own paged cache: its pages are read where they lie, through a block table.

transformers says where tokens lie in one of two ways: a block table (batches of decodes only), or the places of every
token to write and to read. A table is made from the latter once per step. Layers with a sliding window keep a ring of
tokens that is overwritten in the step itself: transformers reads it out, and the kernel runs over what it read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.hal import NHD, AttentionSpec, BatchView, GroupView, LayerCache, RaggedKV
from dougong_transformers.kernels import Kernel, kernel_for

__all__ = ["attend_paged"]

_SLIDING = "sliding_attention"


def attend_paged(
    module: Any,
    cache: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    given: dict[str, Any],
) -> torch.Tensor:
    """One step of continuous batching: q [1, H, T, D], new k [1, K, T, D] and v -> [1, T, H, Dv].

    ``given`` holds transformers' description of the batch: cu_seq_lens_q, cu_seq_lens_k, max_length_k, and block_table
    or read_index and write_index.
    """
    from dougong_transformers.attention import layer_args, layer_spec

    layer: int = module.layer_idx
    allocator = cache.layer_to_allocator[layer]
    sliding = allocator.layer_type == _SLIDING
    window = allocator.sliding_window if sliding else None
    args = layer_args(module, sinks)
    spec = layer_spec(q, k, v, scaling, softcap, sinks, window=window)
    step = _step_of(cache, allocator, given, q.device)
    tokens = step.tokens
    out = q.new_zeros((q.shape[2], spec.num_heads, spec.head_dim_v)) if tokens < q.shape[2] else None
    if out is None:
        out = q.new_empty((tokens, spec.num_heads, spec.head_dim_v))
    flat_q = q[0].transpose(0, 1)[:tokens]
    if step.paged:
        pages = _pages(cache, allocator, layer, spec)
        kernel = step.kernel(q.device, spec, allocator.tokens_per_page)
        new_k, new_v = (x[0].transpose(0, 1)[:tokens] for x in (k, v))
        kernel.attention.write(args, new_k, new_v, pages, step.view.slots)
        kernel.attention.run(kernel.plan_for(step, step.batch), args, flat_q, pages, out=out[:tokens])
        return out[None]
    # transformers writes, and reads out the ring where there is one: a copy of no more than the windows.
    k, v = cache.update(key_states=k, value_states=v, layer_idx=layer, kwargs=dict(given))
    kernel = step.kernel(q.device, spec, 0)
    kv = RaggedKV(k[0].transpose(0, 1), v[0].transpose(0, 1), step.cu_k, step.host_cu_k)
    kernel.attention.run(kernel.plan_for(step, step.batch), args, flat_q, kv, out=out[:tokens])
    return out[None]


@dataclass(eq=False)
class _Step:
    """One step as one kind of layer sees it; layers of that kind share it."""

    tokens: int
    batch: BatchView
    paged: bool
    cu_k: torch.Tensor
    host_cu_k: torch.Tensor
    kernels: dict[tuple[AttentionSpec, int], Kernel] = field(default_factory=dict)

    @property
    def view(self) -> GroupView:
        return self.batch.groups[0]

    def kernel(self, device: torch.device, spec: AttentionSpec, block: int) -> Kernel:
        found = self.kernels.get((spec, block))
        if found is None:
            batch = self.batch
            found = kernel_for(device, spec, block, batch.num_rows, batch.num_tokens, self.view.max_kv_len)
            self.kernels[spec, block] = found
        return found


def _step_of(cache: Any, allocator: Any, given: dict[str, Any], device: torch.device) -> _Step:
    """The step, made at its first layer. Every step has a ``cu_seq_lens_q`` of its own, held so that it stays one."""
    marker = given["cu_seq_lens_q"]
    held: tuple[Any, dict[str, _Step]] | None = getattr(cache, "_dougong_steps", None)
    if held is None or held[0] is not marker:
        held = cache._dougong_steps = (marker, {})
    step = held[1].get(allocator.layer_type)
    if step is None:
        step = held[1][allocator.layer_type] = _make_step(allocator, given, device)
    return step


def _make_step(allocator: Any, given: dict[str, Any], device: torch.device) -> _Step:
    cu_q = given["cu_seq_lens_q"].to(torch.int32).contiguous()
    cu_k = given["cu_seq_lens_k"][allocator.layer_type].to(torch.int32).contiguous()
    rows = cu_q.shape[0] - 1
    lengths = cu_k[1:] - cu_k[:-1]
    page: int = allocator.tokens_per_page
    tables = given.get("block_table")
    host_cu_q = cu_q.to("cpu")
    tokens = int(host_cu_q[-1])
    host_lengths = lengths.to("cpu")
    longest = int(host_lengths.max()) if rows else 0
    reads = None if tables is not None else given["read_index"][allocator.index]
    read = reads is not None and reads.numel() > 0 and allocator.layer_type != _SLIDING
    paged = tables is not None or read
    if tables is not None:
        table = tables[allocator.index].to(torch.int32)
        last = (lengths[:tokens] - 1).long()  # only rows without padding come this way: one token each
        slots = table[torch.arange(tokens, device=device), last // page].long() * page + last % page
    elif reads is not None and read:
        width = -(-longest // page)
        first = cu_k[:-1, None].long() + torch.arange(0, width * page, page, device=device)
        table = (reads[first.clamp_(max=reads.shape[0] - 1)] // page).to(torch.int32)
        slots = given["write_index"][allocator.index][:tokens]
    else:
        table = torch.zeros((rows, 1), dtype=torch.int32, device=device)
        slots = torch.empty(0, dtype=torch.int64, device=device)
    q_lens = (host_cu_q[1:] - host_cu_q[:-1]).tolist()
    batch = BatchView(
        num_rows=rows,
        num_tokens=tokens,
        num_decode_rows=next((i for i, queries in enumerate(q_lens) if queries != 1), rows),
        max_q_len=max(q_lens, default=0),
        cu_q=cu_q,
        host_cu_q=host_cu_q,
        groups=(GroupView(lengths, host_lengths, longest, table, slots),),
    )
    return _Step(tokens, batch, paged, cu_k, cu_k.to("cpu"))


def _pages(cache: Any, allocator: Any, layer: int, spec: AttentionSpec) -> LayerCache:
    """A layer's pages [pages, tokens per page, K, D] as a cache of ours, made once."""
    known: dict[int, LayerCache] | None = getattr(cache, "_dougong_pages", None)
    if known is None:
        known = cache._dougong_pages = {}
    found = known.get(layer)
    if found is None or found.spec != spec:
        k, v = allocator.get_cache_for_block_table(layer)
        found = known[layer] = LayerCache({"k": k, "v": v}, NHD, allocator.tokens_per_page, spec)
    return found
