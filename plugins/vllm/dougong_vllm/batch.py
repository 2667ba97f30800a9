"""vLLM's description of a batch in dougong's terms. Knows vLLM's field names, and imports nothing of it."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import BatchView, GroupView

__all__ = ["split_cache", "to_batch", "without_negatives"]


def without_negatives(slots: torch.Tensor, places: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """vLLM's slot mapping [T] with every -1 (padding) sent to a place of block 0, which vLLM gives to no request.

    ``places`` [T] int64: i modulo the block size. Padding token i goes to place i of the block, so within a block's
    worth no two meet; what is in that block is never read. Every other slot lies beyond it, so the larger of the two is
    the answer: one launch. ``out`` [T] int64: where to put it, for addresses that stay.
    """
    return torch.maximum(slots, places, out=out)


def to_batch(common: Any, slots: torch.Tensor, *, stays: bool = False) -> BatchView:
    """A ``CommonAttentionMetadata`` as a batch. Rows that vLLM pads a graph's batch with have no queries.

    Runs once per step, before which the device may have nothing to do: what vLLM has in the right form already is
    taken as it is, since a slice costs a microsecond.

    ``slots``: the slot mapping without negatives. Lengths are exact on the device only: vLLM's host copies are bounds.
    ``stays``: a graph will read the tensors again where they lie.

    Raises:
        NotImplementedError: with ``stays``, a tensor that would have to be converted: a graph would read a copy.
    """
    rows: int = common.num_reqs
    host_cu_q = _first(common.query_start_loc_cpu, rows + 1)
    starts = host_cu_q.numpy()
    tokens = int(starts[rows])
    if common.max_query_len == 1 and tokens <= rows and starts[tokens] == tokens:
        # One query each, and rows without any behind them.
        decodes, longest = tokens, min(1, tokens)
    else:
        lengths = starts[1:] - starts[:-1]
        others = (lengths != 1).nonzero()[0]
        decodes, longest = int(others[0]) if len(others) else rows, int(lengths.max(initial=0))
    group = GroupView(
        kv_len=_first(common.seq_lens, rows, stays),
        host_kv_len=None,
        max_kv_len=int(common.max_seq_len),
        block_table=_first(common.block_table_tensor, rows, stays),
        slots=slots,
    )
    return BatchView(
        num_rows=rows,
        num_tokens=tokens,
        num_decode_rows=decodes,
        max_q_len=longest,
        cu_q=_first(common.query_start_loc, rows + 1, stays),
        host_cu_q=host_cu_q,
        groups=(group,),
    )


def _first(tensor: torch.Tensor, count: int, stays: bool = False) -> torch.Tensor:
    """The first rows of ``tensor``, as int32."""
    if tensor.dtype is not torch.int32:
        if stays:
            raise NotImplementedError(
                f"vLLM hands a batch to be captured in {tensor.dtype}, where dougong's attention backend reads "
                "torch.int32 in place; start with --enforce-eager"
            )
        tensor = tensor.to(torch.int32)
    return tensor if tensor.shape[0] == count else tensor[:count]


def split_cache(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's cache [blocks, K, N, 2·D] of any strides as planes k and v [blocks, N, K, D], without a copy."""
    both = kv_cache.transpose(1, 2)
    return both[..., :head_size], both[..., head_size:]
