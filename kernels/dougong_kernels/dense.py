"""Keys of paged rows gathered into one dense run, for vendor operators that page only through some caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dougong.hal import BatchView, GroupView

__all__ = ["DenseKeys", "dense_keys"]


@dataclass(frozen=True)
class DenseKeys:
    """Rows from ``first`` on: ``slots`` [Tk] int64 of their keys in order, cu_q and cu_k [rows + 1] int32 from 0,
    and the largest query and key counts."""

    slots: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


def dense_keys(batch: BatchView, view: GroupView, block_size: int, first: int) -> DenseKeys | None:
    """None where no row follows ``first``. Reads host lengths: outside capture only."""
    if batch.num_rows <= first:
        return None
    assert view.host_kv_len is not None, "the KernelSpec asks for host lengths"
    lengths = view.host_kv_len[first : batch.num_rows].to(torch.int64)
    device = view.block_table.device
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=starts[1:])
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(int(starts[-1])) - starts[row]
    row, position = (row + first).to(device), position.to(device)
    block = view.block_table[row, torch.div(position, block_size, rounding_mode="floor")]
    queries = batch.host_cu_q[first : batch.num_rows + 1]
    return DenseKeys(
        slots=block.to(torch.int64) * block_size + position % block_size,
        cu_q=(batch.cu_q[first : batch.num_rows + 1] - batch.cu_q[first]).to(torch.int32),
        cu_k=starts.to(torch.int32).to(device),
        max_q=int((queries[1:] - queries[:-1]).max()),
        max_k=int(lengths.max()),
    )
