"""SGLang's description of a batch in dougong's terms. Knows SGLang's field names, and imports nothing of it."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import BatchView, GroupView

__all__ = ["counted", "decodes", "pages", "table_of"]


def table_of(
    columns: torch.Tensor, rows: torch.Tensor, width: int, page: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Block table [B, width] int32 from every ``page``-th column of SGLang's table of token places.

    Pages are runs of ``page`` places. ``out``: where to put it, for addresses that stay; entries past a row's end are
    what was there.
    """
    found = (columns if columns.shape[1] == width else columns[:, :width]).index_select(0, rows)
    if out is not None and out.shape[1] != width:
        out = out[:, :width]
    if out is None:
        return (torch.div(found, page, rounding_mode="floor") if page > 1 else found).to(torch.int32)
    return torch.div(found, page, rounding_mode="floor", out=out) if page > 1 else out.copy_(found)


def pages(buffer: torch.Tensor, page: int) -> torch.Tensor:
    """A pool's buffer [places, K, D] as a plane [pages, page, K, D], without a copy."""
    return buffer[: buffer.shape[0] // page * page].unflatten(0, (-1, page))


def decodes(group: GroupView, cu_q: torch.Tensor, host_cu_q: torch.Tensor) -> BatchView:
    """A batch of one query per row. ``cu_q`` and ``host_cu_q`` [B+1] int32 count from 0."""
    rows = cu_q.shape[0] - 1
    return BatchView(
        num_rows=rows, num_tokens=rows, num_decode_rows=rows, max_q_len=min(rows, 1), cu_q=cu_q, host_cu_q=host_cu_q,
        groups=(group,),
    )  # fmt: skip


def counted(group: GroupView, forward: Any, device: torch.device) -> BatchView:
    """A ``ForwardBatch`` whose rows have any number of queries.

    Rows keep SGLang's order: in mixed batches its decodes come last, and count as rows of one query.
    """
    rows: int = forward.batch_size
    q_lens = list(forward.extend_seq_lens_cpu)[:rows]
    host_cu_q = torch.zeros(rows + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(q_lens, dtype=torch.int32), 0, dtype=torch.int32, out=host_cu_q[1:])
    cu_q = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(forward.extend_seq_lens[:rows], 0, dtype=torch.int32, out=cu_q[1:])
    return BatchView(
        num_rows=rows,
        num_tokens=int(host_cu_q[-1]),
        num_decode_rows=next((row for row, queries in enumerate(q_lens) if queries != 1), rows),
        max_q_len=max(q_lens, default=0),
        cu_q=cu_q,
        host_cu_q=host_cu_q,
        groups=(group,),
    )
