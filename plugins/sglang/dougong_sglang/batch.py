"""SGLang's description of a batch in dougong's terms. Knows SGLang's field names, and imports nothing of it."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import BatchView, GroupView

__all__ = ["pages", "table_of", "to_batch"]


def table_of(
    req_to_token: torch.Tensor, rows: torch.Tensor, width: int, page: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Block table [B, width] int32 from SGLang's table of token places, whose pages are runs of ``page`` places.

    ``out``: where to put it, for addresses that stay. Entries past a row's end are what was there.
    """
    found = req_to_token[rows.long(), : width * page : page]
    found = torch.div(found, page, rounding_mode="floor").to(torch.int32)
    if out is None:
        return found
    out[: found.shape[0], : found.shape[1]] = found
    return out


def pages(buffer: torch.Tensor, page: int) -> torch.Tensor:
    """A pool's buffer [places, K, D] as a plane [pages, page, K, D], without a copy."""
    return buffer[: buffer.shape[0] // page * page].unflatten(0, (-1, page))


def to_batch(forward: Any, table: torch.Tensor, kv_len: torch.Tensor, cu_q: torch.Tensor, longest: int) -> BatchView:
    """A ``ForwardBatch`` as a batch. ``kv_len`` [B] and ``cu_q`` [B+1] are int32 on the device.

    Rows keep SGLang's order: in mixed batches its decodes come last, and count as rows of one query.
    """
    rows: int = forward.batch_size
    q_lens = [1] * rows if forward.forward_mode.is_decode_or_idle() else list(forward.extend_seq_lens_cpu)[:rows]
    host_cu_q = torch.zeros(rows + 1, dtype=torch.int32)
    host_cu_q[1:] = torch.tensor(q_lens, dtype=torch.int32).cumsum(0)
    host = forward.seq_lens_cpu
    group = GroupView(
        kv_len=kv_len,
        host_kv_len=None if host is None else host[:rows].to(torch.int32),
        max_kv_len=longest,
        block_table=table,
        slots=forward.out_cache_loc.to(torch.int64),
    )
    return BatchView(
        num_rows=rows,
        num_tokens=int(host_cu_q[-1]),
        num_decode_rows=next((row for row, queries in enumerate(q_lens) if queries != 1), rows),
        max_q_len=max(q_lens, default=0),
        cu_q=cu_q,
        host_cu_q=host_cu_q,
        groups=(group,),
    )
