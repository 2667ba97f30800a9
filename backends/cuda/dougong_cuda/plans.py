"""Which queries of a step see nothing: the libraries leave their answers open."""

from __future__ import annotations

import torch

from dougong.hal import BatchView, Device, GroupView, Limits, Plan
from dougong.hal.attention_spec import AttentionSpec

__all__ = ["SightPlan", "capturing", "clear_blind", "decodes_of", "from_row", "some_blind"]


class SightPlan(Plan):
    """``blind`` [tokens] bool on the device: queries that see no key. ``some``: whether there are any; None where only
    the device knows."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.blind = torch.zeros(limits.max_tokens, dtype=torch.bool, device=device)
        self.some: bool | None = None

    def look(self, batch: BatchView, view: GroupView, spec: AttentionSpec) -> None:
        """Fill from a batch."""
        self.batch = batch
        self.blind[: batch.num_tokens].copy_(batch.blind(spec, view.kv_len))
        self.some = None if view.host_kv_len is None else some_blind(batch, spec, view.host_kv_len)

    def clear(self, out: torch.Tensor, lse: torch.Tensor | None, device: Device) -> None:
        """Give blind queries their answer. A captured call does so always: a later replay may have some."""
        if self.some is False and not capturing(device):
            return
        clear_blind(self.blind[: out.shape[0]], out, lse)


def some_blind(batch: BatchView, spec: AttentionSpec, host_len: torch.Tensor) -> bool:
    """Whether any query sees nothing; from the host's lengths [B]."""
    queries = batch.host_cu_q[1 : batch.num_rows + 1] - batch.host_cu_q[: batch.num_rows]
    lengths = host_len[: batch.num_rows]
    least = queries if spec.causal or spec.window is not None else queries.clamp(max=1)
    return bool((lengths < least).any())


def clear_blind(blind: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """out [T, H, Dv] = 0 and lse [T, H] = -inf where ``blind`` [T]."""
    out.masked_fill_(blind[:, None, None], 0)
    if lse is not None:
        lse.masked_fill_(blind[:, None], -torch.inf)


def capturing(device: Device) -> bool:
    """Whether a graph is being recorded."""
    return device.graphs is not None and bool(device.module.is_current_stream_capturing())


def decodes_of(batch: BatchView) -> BatchView:
    """The batch's decode rows, as a batch."""
    rows = batch.num_decode_rows
    groups = tuple(
        GroupView(
            view.kv_len[:rows],
            None if view.host_kv_len is None else view.host_kv_len[:rows],
            view.max_kv_len,
            view.block_table[:rows],
            view.slots[:rows],
        )
        for view in batch.groups
    )
    return BatchView(rows, rows, rows, 1, batch.cu_q[: rows + 1], batch.host_cu_q[: rows + 1], groups)


def from_row(batch: BatchView, first: int) -> BatchView:
    """The batch's rows from ``first`` (a number of decode rows) on, as a batch."""
    if not first:
        return batch
    groups = tuple(
        GroupView(
            view.kv_len[first:],
            None if view.host_kv_len is None else view.host_kv_len[first:],
            view.max_kv_len,
            view.block_table[first:],
            view.slots[first:],
        )
        for view in batch.groups
    )
    return BatchView(
        batch.num_rows - first, batch.num_tokens - first, 0, batch.max_q_len, batch.cu_q[first:] - first,
        batch.host_cu_q[first:] - first, groups,
    )  # fmt: skip
