"""vLLM's description of a batch in dougong's terms. Knows vLLM's field names, and imports nothing of it."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import BatchView, GroupView

__all__ = ["split_cache", "to_batch", "without_negatives"]


def without_negatives(slots: torch.Tensor, block_size: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """vLLM's slot mapping [T] with every -1 (padding) sent to a place of block 0, which vLLM gives to no request.

    Padding token i goes to place i of the block, so within a block's worth no two meet; what is in that block is never
    read. ``out`` [T] int64: where to put it, for addresses that stay.
    """
    places = torch.arange(slots.shape[0], device=slots.device, dtype=torch.int64) % block_size
    found = torch.where(slots < 0, places, slots.to(torch.int64))
    return found if out is None else out.copy_(found)


def to_batch(common: Any, slots: torch.Tensor) -> BatchView:
    """A ``CommonAttentionMetadata`` as a batch. Rows that vLLM pads a graph's batch with have no queries.

    ``slots``: the slot mapping without negatives. Lengths are exact on the device only: vLLM's host copies are bounds.
    """
    host_cu_q = common.query_start_loc_cpu[: common.num_reqs + 1].to(torch.int32)
    lengths = (host_cu_q[1:] - host_cu_q[:-1]).tolist()
    decodes = next((row for row, queries in enumerate(lengths) if queries != 1), len(lengths))
    group = GroupView(
        kv_len=common.seq_lens[: common.num_reqs].to(torch.int32),
        host_kv_len=None,
        max_kv_len=int(common.max_seq_len),
        block_table=common.block_table_tensor[: common.num_reqs],
        slots=slots,
    )
    return BatchView(
        num_rows=common.num_reqs,
        num_tokens=int(host_cu_q[-1]),
        num_decode_rows=decodes,
        max_q_len=max(lengths, default=0),
        cu_q=common.query_start_loc[: common.num_reqs + 1].to(torch.int32),
        host_cu_q=host_cu_q,
        groups=(group,),
    )


def split_cache(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's cache [blocks, K, N, 2·D] of any strides as planes k and v [blocks, N, K, D], without a copy."""
    both = kv_cache.transpose(1, 2)
    return both[..., :head_size], both[..., head_size:]
