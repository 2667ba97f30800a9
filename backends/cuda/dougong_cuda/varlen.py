"""torch's own variable-length attention: ragged rows as they are, rows of a cache gathered into one run first."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import (
    NHD,
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
from dougong_cuda.limits import varlen_refusals
from dougong_cuda.plans import SightPlan, clear_blind
from dougong_kernels.dense import DenseKeys, dense_keys
from dougong_kernels.library import unusable
from dougong_kernels.ops.write import write

__all__ = ["VarlenAttention"]


class VarlenPlan(SightPlan):
    """One step. ``dense``: where the keys of all rows lie; None before the first."""

    dense: DenseKeys | None = None


class VarlenAttention(AttentionKernel):
    """``torch.nn.attention.varlen.varlen_attn``: for encoders and a host's prompts. A cache costs a copy of its keys in
    every layer, so it is no choice for decoding; it needs host lengths, and has no graphs."""

    layouts = (NHD,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._library = sdk.varlen()
        self._options: dict[str, Any] = {}
        left = -1 if spec.window is None else spec.window - 1
        if self._library.window:
            self._options["window_size"] = (left, 0 if spec.causal else left)
        else:
            self._options["is_causal"] = spec.causal
        if self._library.scale:
            self._options["scale"] = spec.scale
        if self._library.gqa:
            self._options["enable_gqa"] = spec.group_size > 1

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        refused = unusable(sdk.varlen)
        if refused:
            return refused
        found, library, spec = list(varlen_refusals(query, capability(device))), sdk.varlen(), query.spec
        if not library.scale and abs(spec.scale * spec.head_dim**0.5 - 1) > 1e-6:
            found.append(Refusal(f"scale {spec.scale}: this torch takes 1/sqrt(head dim) only", "torch 2.11 or newer"))
        if not library.window and spec.window is not None:
            found.append(Refusal("a window, under this torch", "torch 2.11 or newer"))
        return tuple(found)

    def new_plan(self) -> VarlenPlan:
        return VarlenPlan(self.limits, self.device.torch_device)

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, VarlenPlan)
        view = batch.groups[self.group.index]
        into.look(batch, view, self.spec)
        into.dense = dense_keys(batch, view, self.group.kernel_block, 0)

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
        assert isinstance(plan, VarlenPlan)
        batch = plan.batch
        if not batch.num_tokens:
            return
        if isinstance(kv, RaggedKV):
            longest = int(kv.host_lengths.max())
            self._attend(q, kv.k, kv.v, batch.cu_q[: batch.num_rows + 1], kv.cu_k, batch.max_q_len, longest, out)
            clear_blind(batch.blind(self.spec, kv.lengths), out, None)
            return
        dense = plan.dense
        assert dense is not None
        k, v = kv.read(dense.slots)
        self._attend(q, k, v, dense.cu_q, dense.cu_k, dense.max_q, dense.max_k, out)
        plan.clear(out, None, self.device)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        out: torch.Tensor,
    ) -> None:
        if not max_k:
            out.zero_()
            return
        if not self._library.gqa and self.spec.group_size > 1:
            k, v = (plane.repeat_interleave(self.spec.group_size, dim=1) for plane in (k, v))
        q, k, v = (one if one.stride(-1) == 1 else one.contiguous() for one in (q, k, v))
        out.copy_(self._library.call(q, k, v, cu_q, cu_k, max_q, max_k, **self._options))

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)
