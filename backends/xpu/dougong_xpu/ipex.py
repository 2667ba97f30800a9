"""Attention through intel-extension-for-pytorch 2.8, for torch 2.8: decodes in one call, other rows in another."""

from __future__ import annotations

import torch

from dougong.hal import (
    AttentionQuery,
    AttentionSpec,
    Device,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    RaggedKV,
    Refusal,
)
from dougong_kernels.library import unusable
from dougong_xpu import sdk
from dougong_xpu.limits import IPEX_HND, ipex_refusals
from dougong_xpu.plans import BlindAttention, BlindPlan

__all__ = ["IpexAttention"]


class IpexAttention(BlindAttention):
    """``ipex.llm.modules.PagedAttention``. The library is discontinued: eager only, plain causal attention only."""

    layouts = (IPEX_HND,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._ops = sdk.ipex()
        heads = torch.arange(spec.num_kv_heads, dtype=torch.int32).repeat_interleave(spec.group_size)
        self._head_mapping = heads.to(device.torch_device)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return (*ipex_refusals(query), *unusable(sdk.ipex))

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
        assert isinstance(plan, BlindPlan) and isinstance(kv, LayerCache)
        batch = plan.batch
        view, first, rows = batch.groups[self.group.index], batch.num_decode_rows, batch.num_rows
        longest = max(1, view.max_kv_len)
        if first:
            self._ops.single_query_cached_kv_attention(
                out[:first], q[:first].contiguous(), kv.k, kv.v, self._head_mapping, self.spec.scale,
                view.block_table[:first], view.kv_len[:first], self.group.kernel_block, longest, None,
            )  # fmt: skip
        if rows > first:
            cu_k = torch.zeros(rows - first + 1, dtype=torch.int32, device=q.device)
            torch.cumsum(view.kv_len[first:rows], 0, out=cu_k[1:])
            cu_q = (batch.cu_q[first : rows + 1] - batch.cu_q[first]).to(torch.int32)
            self._ops.flash_attn_varlen_func(
                out[first:], q[first:].contiguous(), kv.k, kv.v, cu_q, cu_k, batch.max_q_len, longest, self.spec.scale,
                self.spec.causal, view.block_table[first:rows], None,
            )  # fmt: skip
        out.masked_fill_(plan.blind[: batch.num_tokens], 0)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        if k.shape[0]:
            self._ops.reshape_and_cache(k.contiguous(), v.contiguous(), cache.k, cache.v, slots)
