"""Attention through vllm-xpu-kernels and sgl-kernel-xpu: one varlen call per layer, whatever the batch holds."""

from __future__ import annotations

from typing import Any

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
from dougong_xpu.limits import SGL_NHD, VLLM_NHD, sgl_refusals, vllm_refusals
from dougong_xpu.plans import BlindAttention, BlindPlan, head, portable_write

__all__ = ["SglAttention", "VllmAttention"]


class VllmAttention(BlindAttention):
    """``flash_attn_varlen_func`` of vllm-xpu-kernels, and its cache write."""

    layouts = (VLLM_NHD,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._attend = sdk.vllm()
        self._narrow = spec.kv_dtype != spec.dtype
        self._window = [-1, -1] if spec.window is None else [spec.window - 1, 0]
        self._scales: dict[float, torch.Tensor] = {}

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return (*vllm_refusals(query), *unusable(sdk.vllm))

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
        assert isinstance(plan, BlindPlan)
        batch = plan.batch
        if not batch.num_tokens:
            return
        options: dict[str, Any] = {
            "softmax_scale": self.spec.scale, "causal": self.spec.causal, "window_size": self._window, "out": out,
        }  # fmt: skip
        if isinstance(kv, RaggedKV):
            longest = int(kv.host_lengths.max())
            options["cu_seqlens_k"] = kv.cu_k
            marks = batch.blind(self.spec, kv.host_lengths)
            blind = marks[:, None, None].to(out.device)
        else:
            view = batch.groups[self.group.index]
            longest = view.max_kv_len
            options |= {
                "seqused_k": head(view.kv_len, batch.num_rows),
                "block_table": head(view.block_table, batch.num_rows),
            }
            blind = head(plan.blind, batch.num_tokens)
        if self._narrow:
            options |= {"k_descale": self._scale(layer.k_scale), "v_descale": self._scale(layer.v_scale)}
        cu_q = head(batch.cu_q, batch.num_rows + 1)
        self._attend(q, kv.k, kv.v, max(1, batch.max_q_len), cu_q, max(1, longest), **options)
        out.masked_fill_(blind, 0)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        if not k.shape[0]:
            return
        kind = "fp8_e4m3" if self._narrow else "auto"
        torch.ops._C_cache_ops.reshape_and_cache_flash(
            k, v, cache.k, cache.v, slots, kind, self._scale(layer.k_scale), self._scale(layer.v_scale)
        )

    def _scale(self, scale: float | torch.Tensor) -> torch.Tensor:
        """A float32 tensor that owns one element, as the operators ask; made once per value."""
        if isinstance(scale, torch.Tensor):
            return scale if scale.untyped_storage().nbytes() == 4 else scale.float().clone()
        found = self._scales.get(scale)
        if found is None:
            found = self._scales[scale] = torch.full((1,), scale, device=self.device.torch_device)
        return found


class SglAttention(BlindAttention):
    """``flash_attn_with_kvcache`` of sgl-kernel-xpu."""

    layouts = (SGL_NHD,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._attend = sdk.sgl()
        self._write = portable_write(device.torch_device)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return (*sgl_refusals(query), *unusable(sdk.sgl))

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
        if not batch.num_tokens:
            return
        view, rows = batch.groups[self.group.index], batch.num_rows
        self._attend(
            q, kv.k, kv.v, cache_seqlens=head(view.kv_len, rows), page_table=head(view.block_table, rows),
            cu_seqlens_q=head(batch.cu_q, rows + 1), max_seqlen_q=max(1, batch.max_q_len),
            max_seqlen_k=max(1, view.max_kv_len), softmax_scale=self.spec.scale, causal=self.spec.causal,
            out=out,
        )  # fmt: skip
        out.masked_fill_(head(plan.blind, batch.num_tokens), 0)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        self._write(layer, k, v, cache, slots)
