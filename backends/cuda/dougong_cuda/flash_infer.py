"""FlashInfer's batch wrappers: one for decodes, one for all other rows of a paged cache, one for ragged rows."""

from __future__ import annotations

import math
from typing import Any

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
from dougong_cuda.flash import capability
from dougong_cuda.limits import INFER_HND, INFER_NHD, infer_refusals
from dougong_cuda.plans import SightPlan, clear_blind, from_row
from dougong_kernels.library import unusable
from dougong_kernels.ops.write import write

__all__ = ["FlashInferAttention"]

_WORKSPACE = 256 << 20
"""Bytes for partial results of split keys; the wrappers, which run one after another, share it."""
_LN2 = math.log(2.0)


class FlashInferPlan(SightPlan):
    """One step. ``decodes``: how many rows the decode wrapper takes; ``others`` whether rows follow them."""

    decodes = 0
    others = False


class FlashInferAttention(AttentionKernel):
    """Needs host lengths, and keeps what it planned in its wrappers: one plan at a time, and no graphs."""

    layouts = (INFER_NHD, INFER_HND)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        module = sdk.flashinfer()
        layout = group.layout.name.upper()
        work = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device.torch_device)
        # Their products on tensor cores pay from about four query heads on a kv head, and where the ratio is odd.
        tensor_cores = spec.group_size >= 4 or spec.group_size not in (1, 2)
        self._decode = module.BatchDecodeWithPagedKVCacheWrapper(work, layout, use_tensor_cores=tensor_cores)
        self._prefill = module.BatchPrefillWithPagedKVCacheWrapper(work, layout)
        self._ragged = module.BatchPrefillWithRaggedKVCacheWrapper(work, "NHD")
        self._ragged_for: Any = None
        self._copied: Any = None

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return (*infer_refusals(query, capability(device)), *unusable(sdk.flashinfer))

    def new_plan(self) -> FlashInferPlan:
        return FlashInferPlan(self.limits, self.device.torch_device)

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, FlashInferPlan)
        view = batch.groups[self.group.index]
        into.look(batch, view, self.spec)
        self._ragged_for = None
        # The rule for decodes knows no mask: one query sees all keys, which is the causal answer.
        into.decodes = batch.num_decode_rows
        into.others = batch.num_rows > into.decodes
        self._wait()
        if into.decodes:
            pages = self._pages(batch, 0, into.decodes)
            self._decode.plan(*pages, *self._heads(), self.group.kernel_block, **self._options())
        if into.others:
            rest = from_row(batch, into.decodes)
            self._prefill.plan(
                rest.host_cu_q[: rest.num_rows + 1], *self._pages(batch, into.decodes, batch.num_rows), *self._heads(),
                self.group.kernel_block, causal=self.spec.causal, **self._options(),
            )  # fmt: skip
        self._mark()

    def _wait(self) -> None:
        """The wrappers copy their plans from pinned memory that the next plan is written to."""
        if self._copied is not None:
            self._copied.synchronize()

    def _mark(self) -> None:
        self._copied = self.device.new_event()
        self._copied.record()

    def _heads(self) -> tuple[int, int, int]:
        return self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim

    def _options(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "sm_scale": spec.scale, "logits_soft_cap": spec.softcap or 0.0, "q_data_type": spec.dtype,
            "kv_data_type": spec.dtype,
        }  # fmt: skip

    def _pages(self, batch: BatchView, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(first page of each row [rows + 1] host, pages in order device, tokens in each row's last page [rows] host).

        A row without keys gets one page, so that no empty row reaches the kernels; its answer is cleared afterwards.
        """
        view, size = batch.groups[self.group.index], self.group.kernel_block
        assert view.host_kv_len is not None, "the KernelSpec asks for host lengths"
        lengths = view.host_kv_len[first:last].clamp(min=1)
        counts = torch.div(lengths + size - 1, size, rounding_mode="floor")
        starts = torch.zeros(last - first + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=starts[1:])
        row = torch.repeat_interleave(torch.arange(last - first), counts)
        place = torch.arange(int(starts[-1])) - starts[row]
        empty = view.host_kv_len[first:last][row] == 0
        where = view.block_table.device
        pages = view.block_table[(row + first).to(where), place.to(where)]
        if bool(empty.any()):  # a table's entries past a row's keys are no addresses
            pages = pages.masked_fill(empty.to(where), 0)
        return starts, pages.to(torch.int32), (lengths - (counts - 1) * size).to(torch.int32)

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
        assert isinstance(plan, FlashInferPlan)
        batch = plan.batch
        if not batch.num_tokens:
            return
        if isinstance(kv, RaggedKV):
            self._plan_ragged(batch, kv)
            self._call(self._ragged, q, (kv.k.contiguous(), kv.v.contiguous()), out, lse)
            clear_blind(batch.blind(self.spec, kv.lengths), out, lse)
            return
        first, planes = plan.decodes, ((kv.k, kv.v),)
        if first:
            self._call(self._decode, q[:first], planes, out[:first], None if lse is None else lse[:first])
        if plan.others and batch.num_tokens > first:
            self._call(self._prefill, q[first:], planes, out[first:], None if lse is None else lse[first:])
        plan.clear(out, lse, self.device)

    def _plan_ragged(self, batch: BatchView, kv: RaggedKV) -> None:
        """Once for a step's layers, which have their keys at the same places."""
        if self._ragged_for is kv.host_cu_k:
            return
        options = self._options()
        self._wait()
        self._ragged.plan(
            batch.host_cu_q[: batch.num_rows + 1], kv.host_cu_k, *self._heads(), causal=self.spec.causal,
            window_left=-1 if self.spec.window is None else self.spec.window - 1, **options,
        )  # fmt: skip
        self._mark()
        self._ragged_for = kv.host_cu_k

    def _call(
        self, wrapper: Any, q: torch.Tensor, kv: tuple[Any, ...], out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        q = q if q.is_contiguous() else q.contiguous()
        answer = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        if lse is None:
            wrapper.run(q, *kv, out=answer)
        else:
            _, sums = wrapper.run(q, *kv, out=answer, return_lse=True)
            torch.mul(sums, _LN2, out=lse)  # theirs is to base 2
        if answer is not out:
            out.copy_(answer)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)
