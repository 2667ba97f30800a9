"""FlashAttention over paged caches: alone, and for long prompts beside the portable kernels."""

from __future__ import annotations

import torch

from dougong.hal import (
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Device,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    RaggedKV,
    Refusal,
)
from dougong_cuda import sdk
from dougong_cuda.limits import FLASH_NHD, flash_refusals
from dougong_cuda.plans import SightPlan, clear_blind, decodes_of, from_row
from dougong_kernels.attention import TritonAttention, TritonPlan
from dougong_kernels.library import unusable
from dougong_kernels.ops.write import write

__all__ = ["LONG_PROMPT", "FlashAttention", "LongPromptAttention"]

LONG_PROMPT = 4096
"""Queries of a row from which on FlashAttention 3 takes a batch's prompts. Measured on an H100 (bf16, 32 and 8 heads of
128): 464 against 445 TFLOP/s at 4,096 tokens, 582 against 487 at 8,192; at 8 rows of 1,024 the portable kernel leads,
327 against 265."""


class FlashAttention(AttentionKernel):
    """One varlen call per layer, whatever the batch holds. Graphs hold decodes."""

    layouts = (FLASH_NHD,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._library = sdk.flash(capability(device))
        left = -1 if spec.window is None else spec.window - 1
        self._window = (left, 0 if spec.causal else left)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        found = capability(device)
        return (*flash_refusals(query, found), *unusable(lambda: sdk.flash(found)))

    def new_plan(self) -> SightPlan:
        return SightPlan(self.limits, self.device.torch_device)

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, SightPlan)
        into.look(batch, batch.groups[self.group.index], self.spec)

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
        assert isinstance(plan, SightPlan)
        batch, spec = plan.batch, self.spec
        if not batch.num_tokens:
            return
        options = {
            "cu_q": batch.cu_q[: batch.num_rows + 1], "max_q": max(1, batch.max_q_len), "scale": spec.scale,
            "causal": spec.causal, "window": self._window, "softcap": spec.softcap or 0.0, "lse": lse is not None,
            "out": out,
        }  # fmt: skip
        if isinstance(kv, RaggedKV):
            lengths = kv.host_lengths
            found, sums = self._library.ragged(q, kv.k, kv.v, cu_k=kv.cu_k, max_k=max(1, int(lengths.max())), **options)
        else:
            view, rows = batch.groups[self.group.index], batch.num_rows
            found, sums = self._library.paged(
                q, kv.k, kv.v, kv_len=view.kv_len[:rows], table=view.block_table[:rows], max_k=max(1, view.max_kv_len),
                **options,
            )  # fmt: skip
        if found.data_ptr() != out.data_ptr():
            out.copy_(found)
        if lse is not None:
            assert sums is not None
            lse.copy_(sums.transpose(0, 1))
        if isinstance(kv, RaggedKV):
            clear_blind(batch.blind(spec, kv.lengths), out, lse)
        else:
            plan.clear(out, lse, self.device)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)


class LongPromptPlan(TritonPlan):
    """A step of the portable kernels. ``prompts``: the rows that are no decodes, where FlashAttention takes them;
    ``first``: how many decodes come before them."""

    def __init__(self, prompts: SightPlan) -> None:
        super().__init__()
        self._spare = prompts
        self.prompts: SightPlan | None = None
        self.first = 0

    def divide(self, long: bool, first: int) -> SightPlan | None:
        """Whether this step's prompts go to FlashAttention; then, what it plans them in."""
        self.prompts, self.first = (self._spare, first) if long else (None, 0)
        return self.prompts


class LongPromptAttention(TritonAttention):
    """The portable kernels, and FlashAttention 3 for steps with a prompt of ``LONG_PROMPT`` tokens or more, whose
    decodes stay where they are. Graphs hold no such step, so they are the portable kernels' alone."""

    layouts = (FLASH_NHD,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._flash = FlashAttention(spec, group, limits, device)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        found = (*FlashAttention.supports(query, device), *super().supports(query, device))
        major, minor = capability(device)
        if major != 9:
            what = f"compute capability {major}.{minor}: FlashAttention was measured ahead on 9.0 only"
            found = (*found, Refusal(what, "the triton provider"))
        elif not found and sdk.flash((major, minor)).generation != 3:
            found = (Refusal("no FlashAttention 3 among what is installed", "the triton provider"),)
        return found

    def new_plan(self) -> LongPromptPlan:
        plan = LongPromptPlan(self._flash.new_plan())
        plan.paged = super().new_plan().paged
        return plan

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, LongPromptPlan)
        prompts = into.divide(batch.max_q_len >= LONG_PROMPT, batch.num_decode_rows)
        if prompts is None:
            super().plan(batch, into)
            return
        self._flash.plan(from_row(batch, into.first), prompts)
        if into.first:
            super().plan(decodes_of(batch), into)
        into.batch = batch

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
        assert isinstance(plan, LongPromptPlan)
        if plan.prompts is None:
            super().run(plan, layer, q, kv, out=out, lse=lse)
            return
        first = plan.first
        if first:
            super().run(
                plan, layer, q[:first], kv, out=out[:first], lse=None if lse is None else lse[:first]
            )  # fmt: skip
        self._flash.run(
            plan.prompts, layer, q[first:], kv, out=out[first:], lse=None if lse is None else lse[first:]
        )  # fmt: skip


def capability(device: Device) -> tuple[int, int]:
    """(9, 0) of an H100."""
    properties = device.properties  # type: ignore[attr-defined]
    return int(properties.major), int(properties.minor)
