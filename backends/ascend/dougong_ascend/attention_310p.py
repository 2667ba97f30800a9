"""Attention on 310P: ATB's paged operator over the tiled cache, every query a row of its own."""

from __future__ import annotations

import torch

from dougong.hal import (
    AttentionKernel,
    AttentionQuery,
    BatchView,
    Device,
    LayerArgs,
    LayerCache,
    Plan,
    RaggedKV,
    Refusal,
)
from dougong_ascend.layouts import NZ
from dougong_ascend.limits import nz_refusals
from dougong_ascend.plans import host_lengths
from dougong_ascend.store import store

__all__ = ["PagedAttention310P"]

#: Most rows of one call.
_MOST_ROWS = 2048


class _QueryPlan(Plan):
    """``table`` [T, W] int32 and ``lengths`` [T] int32 on the host: what each query sees. ``blind`` [T, 1] bool."""

    table: torch.Tensor
    lengths: torch.Tensor
    blind: torch.Tensor | None


class PagedAttention310P(AttentionKernel):
    """``_npu_paged_attention``: one query per row, so a prompt of n tokens is n rows that share a block table.

    Right for every batch; it reads a prompt's keys once per query, which a prompt operator would not.
    """

    layouts = (NZ,)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return nz_refusals(query)

    def new_plan(self) -> _QueryPlan:
        return _QueryPlan()

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, _QueryPlan)
        into.batch = batch
        view = batch.groups[self.group.index]
        kv_lens, cu_q = host_lengths(view).tolist(), batch.host_cu_q.tolist()
        rows: list[int] = []
        lengths: list[int] = []
        for row in range(batch.num_rows):
            queries = cu_q[row + 1] - cu_q[row]
            rows += [row] * queries
            before = kv_lens[row] - queries
            lengths += [before + place + 1 if self.spec.causal else kv_lens[row] for place in range(queries)]
        seen = torch.tensor(lengths, dtype=torch.int32)
        into.blind = (seen <= 0)[:, None].to(self.device.torch_device) if min(lengths, default=1) <= 0 else None
        into.lengths = seen.clamp_(min=1)  # a query that sees nothing is given a key, and its answer replaced
        index = torch.tensor(rows, dtype=torch.int64, device=self.device.torch_device)
        # Garbage behind the last block may be any number: 0 stands there instead.
        firsts = torch.arange(view.block_table.shape[1], device=index.device) * self.group.kernel_block
        used = firsts[None] < view.kv_len[: batch.num_rows, None]
        into.table = torch.where(used, view.block_table[: batch.num_rows], 0).index_select(0, index)

    def run(
        self,
        plan: Plan,
        layer: LayerArgs,
        q: torch.Tensor,
        kv: LayerCache | RaggedKV,
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        assert isinstance(plan, _QueryPlan) and isinstance(kv, LayerCache)
        spec = self.spec
        query = q.contiguous()
        answer = out if out.is_contiguous() else torch.empty_like(query)
        for begin in range(0, q.shape[0], _MOST_ROWS):
            part = slice(begin, begin + _MOST_ROWS)
            torch.ops.atb._npu_paged_attention(
                query[part], kv.k, kv.v, spec.num_kv_heads, spec.num_heads, spec.scale, plan.table[part],
                plan.lengths[part], answer[part],
            )  # fmt: skip
        if answer is not out:
            out.copy_(answer)
        if plan.blind is not None:
            out.masked_fill_(plan.blind[..., None], 0)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        store(cache, k, v, slots)
