"""Attention in plain torch, for any layout and feature: slow, exact, and right on every device.

Decode rows are done together, other rows one by one; all arithmetic is float32.
"""

from __future__ import annotations

import torch

from dougong.hal.attention import AttentionKernel, AttentionQuery, Plan, Refusal
from dougong.hal.attention_spec import LayerArgs
from dougong.hal.batch import BatchView
from dougong.hal.cache import LayerCache, RaggedKV
from dougong.hal.device import Device

__all__ = ["ReferenceAttention", "attend"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    distance: torch.Tensor,
    scale: float,
    softcap: float | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked attention with the contract's order: scale, softcap, ALiBi, mask, softmax.

    q [B, Q, H, D]; k [B, S, K, D], v [B, S, K, Dv] (anything where no query sees it); visible and distance
    (k_pos − q_pos) [B, Q, S]. Returns out [B, Q, H, Dv] and lse [B, Q, H], float32.
    """
    rows, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    seen = visible.any(1)[:, :, None, None]
    k = torch.where(seen, k.float(), 0.0)
    v = torch.where(seen, v.float(), 0.0)
    grouped = q.float().reshape(rows, queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("bqkgd,bskd->bqkgs", grouped, k).reshape(rows, queries, heads, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes.float()[None, None, :, None] * distance[:, :, None, :].float()
    scores = scores.masked_fill(~visible[:, :, None, :], -torch.inf)
    top = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    if sinks is not None:
        top_all = torch.maximum(top, sinks.float().expand_as(top))
    else:
        top_all = top
    safe = torch.where(top_all == -torch.inf, torch.zeros_like(top_all), top_all)
    weights = torch.exp(scores - safe[..., None])
    total = weights.sum(-1)
    lse = torch.where(total > 0, safe + torch.log(total), torch.full_like(safe, -torch.inf))
    if sinks is not None:
        total = total + torch.exp(sinks.float() - safe)
    share = torch.where(total > 0, total, torch.ones_like(total))
    weights = (weights / share[..., None]).reshape(rows, queries, kv_heads, heads // kv_heads, -1)
    out = torch.einsum("bqkgs,bskd->bqkgd", weights, v)
    return out.reshape(rows, queries, heads, -1), lse


class ReferencePlan(Plan):
    """Row bounds on the host."""

    cu_q: list[int]
    kv_len: list[int]


class ReferenceAttention(AttentionKernel):
    """The fallback of every device, and what the specialised kernels are compared with."""

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return ()

    def new_plan(self) -> ReferencePlan:
        return ReferencePlan()

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, ReferencePlan)
        group = batch.groups[self.group.index]
        into.batch = batch
        into.cu_q = batch.host_cu_q.tolist()
        lengths = group.kv_len if group.host_kv_len is None else group.host_kv_len
        into.kv_len = lengths.tolist()

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
        assert isinstance(plan, ReferencePlan)
        decode = plan.batch.num_decode_rows
        if isinstance(kv, RaggedKV):
            decode = 0
        if decode:
            self._rows(plan, layer, q, kv, 0, decode, out, lse)
        for row in range(decode, plan.batch.num_rows):
            if plan.cu_q[row + 1] > plan.cu_q[row]:
                self._rows(plan, layer, q, kv, row, row + 1, out, lse)

    def _rows(
        self,
        plan: ReferencePlan,
        layer: LayerArgs,
        q: torch.Tensor,
        kv: LayerCache | RaggedKV,
        first: int,
        last: int,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Rows first … last-1, which all have the same number of queries."""
        spec, device = self.spec, q.device
        start, stop = plan.cu_q[first], plan.cu_q[last]
        rows, queries = last - first, (stop - start) // (last - first)
        lengths = torch.tensor(plan.kv_len[first:last], device=device)
        longest = max(plan.kv_len[first:last])
        q_pos = lengths[:, None] - queries + torch.arange(queries, device=device)
        k_pos = torch.arange(longest, device=device)
        distance = k_pos[None, None, :] - q_pos[:, :, None]
        visible = (k_pos[None, :] < lengths[:, None])[:, None, :].expand(rows, queries, longest)
        if spec.causal:
            visible = visible & (distance <= 0)
        if spec.window is not None:
            visible = visible & (distance.abs() < spec.window)
        k, v = self._keys(plan, kv, first, last, longest, visible)
        if self.spec.kv_dtype != self.spec.dtype:
            k, v = k.float() * layer.k_scale, v.float() * layer.v_scale
        got, got_lse = attend(
            q[start:stop].reshape(rows, queries, spec.num_heads, spec.head_dim),
            k, v, visible, distance, spec.scale, spec.softcap,
            layer.slopes if spec.alibi else None,
            layer.sinks if spec.sinks else None,
        )  # fmt: skip
        out[start:stop] = got.reshape(stop - start, spec.num_heads, spec.head_dim_v).to(out.dtype)
        if lse is not None:
            lse[start:stop] = got_lse.reshape(stop - start, spec.num_heads)

    def _keys(
        self,
        plan: ReferencePlan,
        kv: LayerCache | RaggedKV,
        first: int,
        last: int,
        longest: int,
        visible: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K [rows, longest, K, D] and V [rows, longest, K, Dv] of rows that lie behind one block table each."""
        rows = last - first
        if isinstance(kv, RaggedKV):
            begin = int(kv.host_cu_k[first])
            return kv.k[begin : begin + longest][None], kv.v[begin : begin + longest][None]
        view = plan.batch.groups[self.group.index]
        size = kv.block_size
        positions = torch.arange(longest, device=view.block_table.device)
        table = view.block_table[first:last].to(torch.int64)
        # Entries that no query sees may hold anything: they are replaced before they become addresses.
        needed = visible.any(1)
        blocks = table[:, torch.div(positions, size, rounding_mode="floor")] if longest else table[:, :0]
        blocks = torch.where(needed, blocks, torch.zeros_like(blocks))
        slots = (blocks * size + positions % size).flatten()
        k, v = kv.read(slots)
        return k.reshape(rows, longest, *k.shape[1:]), v.reshape(rows, longest, *v.shape[1:])
