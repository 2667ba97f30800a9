"""Attention through CANN's fused operator, paged, with host lengths."""

from __future__ import annotations

from typing import Any

import torch

from dougong.errors import ConfigError, EngineError
from dougong.hal import (
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Device,
    Graph,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    RaggedKV,
    Refusal,
)
from dougong_ascend.graphs import AscendGraph
from dougong_ascend.layouts import HND_PAGED, NHD_PAGED
from dougong_ascend.limits import MOST_KEYS, fused_refusals, gathered_refusals
from dougong_ascend.plans import FusedPlan, GatheredPlan, RowCall
from dougong_ascend.sdk import FusedCall, fused_version
from dougong_ascend.store import check_planes, store_scaled

__all__ = ["FusedAttention", "GatheredAttention", "causal_mask"]

_masks: dict[torch.device, torch.Tensor] = {}


def causal_mask(device: torch.device) -> torch.Tensor:
    """The one mask that the operator's compressed modes (3 and 4) take, whatever the lengths: [2048, 2048] bool, True
    above the diagonal."""
    if device not in _masks:
        _masks[device] = torch.ones(2048, 2048, dtype=torch.bool).triu_(1).to(device)
    return _masks[device]


class FusedAttention(AttentionKernel):
    """``npu_fused_infer_attention_score`` (or its second version: ``DOUGONG_ASCEND_FIA=2``).

    A sink is applied to the operator's answer, as ``out · sigmoid(lse − sink)``: the same number, and the operator's
    own sinks exist for one layout and two head dims only.

    An int8 cache is read as it lies under single queries, gathered and widened under more. Its scales are factors of
    the scale and of the answer: exact, while the operator's own would be rounded to the queries' dtype.
    """

    layouts = (NHD_PAGED, HND_PAGED)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        if limits.max_kv_len > MOST_KEYS:
            raise ConfigError(
                f"max_model_len={limits.max_kv_len}: the operator sees at most {MOST_KEYS} keys under one query. Set "
                f"max_model_len={MOST_KEYS} or less."
            )
        self._version = fused_version()
        self._int8 = spec.kv_dtype == torch.int8
        self._one = torch.ones(1, dtype=spec.dtype, device=device.torch_device)
        self._heads_out = group.layout.name == "hnd"
        self._heads_first = True  # where the operator leaves a choice
        self._mask = causal_mask(device.torch_device)
        self._no_lse = torch.empty(1, dtype=torch.float32, device=device.torch_device)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return fused_refusals(query)

    def new_plan(self) -> FusedPlan:
        return FusedPlan(self.spec, self.group, self.limits, self.device.torch_device)

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, FusedPlan)
        into.fill(batch)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        store_scaled(cache, layer, k, v, slots)

    # -- one layer --------------------------------------------------------------------------------------------

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
        assert isinstance(plan, FusedPlan)
        if lse is None and self.spec.sinks:
            lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        graph = AscendGraph.capturing()
        k_scale, v_scale = layer.host_scales if self._int8 else (1.0, 1.0)
        scale = self.spec.scale * k_scale
        if isinstance(kv, RaggedKV):
            marks = plan.batch.blind(self.spec, kv.host_lengths)
            self._run_ragged(plan, q, kv, marks, out, lse)
            blind = marks[:, None].to(out.device) if bool(marks.any()) else None
        else:
            keys = self._paged_planes(kv)
            for call in plan.calls:
                if graph is not None and call.start:
                    raise EngineError("a graph of this kernel holds decodes only; run other batches without one")
                # A captured call is one task whatever it is updated to.
                parts = call.within(kv.num_blocks, self.group.kernel_block) if graph is None else (call,)
                for part in parts:
                    self._call(part, q, kv, keys, scale, out, lse, graph)
            blind = plan.blind[: out.shape[0]] if plan.any_blind or graph is not None else None
        if blind is not None:
            out.masked_fill_(blind[..., None], 0)
            if lse is not None:
                lse.masked_fill_(blind, -torch.inf)
        if v_scale != 1.0:
            out.mul_(v_scale)
        if self.spec.sinks:
            assert lse is not None and layer.sinks is not None
            out.copy_(out.float() * torch.sigmoid(lse - layer.sinks)[..., None])

    def update_graph(self, graph: Graph, plan: Plan) -> None:
        assert isinstance(graph, AscendGraph) and isinstance(plan, FusedPlan)
        first = plan.calls[0] if plan.calls else None
        for task, call in graph.state.get(self, ()):
            rows = call.query.shape[0]
            if first is None or (first.rows, first.queries) != (rows, 1):
                found = "nothing" if first is None else f"{first.rows} rows of {first.queries} queries"
                raise EngineError(
                    f"a graph of {rows} decodes was planned {found}; it runs batches of its own size only"
                )
            graph.update(task, call.with_lengths(first.kv_lens).launch)

    def _paged_planes(self, kv: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
        """The planes as the operator reads them: [blocks, K, N, D], or [blocks, N, K·D]."""
        check_planes(kv)
        if self._heads_out:
            return kv.k, kv.v
        return kv.k.flatten(2), kv.v.flatten(2)

    def _call(
        self,
        call: RowCall,
        q: torch.Tensor,
        kv: LayerCache,
        keys: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        graph: AscendGraph | None,
    ) -> None:
        arguments: dict[str, Any] = {"actual_seq_lengths_kv": call.kv_lens, "scale": scale}
        if call.slots is not None:
            k, v = kv.read(call.slots)
            key, value = k[None].to(self.spec.dtype), v[None].to(self.spec.dtype)
        else:
            key, value = keys
            arguments |= {"block_table": call.table, "block_size": self.group.kernel_block}
            if self._int8:
                arguments |= {"key_antiquant_scale": self._one, "value_antiquant_scale": self._one}
        self._fused(call, q, key, value, arguments, out, lse, graph)

    def _fused(
        self,
        call: RowCall,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: dict[str, Any],
        out: torch.Tensor,
        lse: torch.Tensor | None,
        graph: AscendGraph | None,
    ) -> None:
        """One call. ``key`` and ``value`` are pages, or [rows, S, K, D]."""
        spec, rows, queries = self.spec, call.rows, call.queries
        arguments |= {
            "num_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads, "softmax_lse_flag": lse is not None,
        }  # fmt: skip
        arguments |= self._masking(call)
        paged = "block_table" in arguments
        part = q[call.start : call.stop].reshape(rows, queries, spec.num_heads, q.shape[-1])
        # One query per row lies the same either way. More of them: as they lie, unless heads come first in the cache,
        # or a token is wider than the operator's 16 bits.
        heads_first = self._heads_first and (
            queries == 1 or (paged and self._heads_out) or spec.num_heads * q.shape[-1] >= 65535
        )
        if heads_first and not paged:
            key, value = key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
        arguments["input_layout"] = "BNSD" if heads_first else "BSND"
        query = part.transpose(1, 2).contiguous() if heads_first else part.contiguous()
        whole = out[call.start : call.stop]
        direct = whole.is_contiguous() and (queries == 1 or not heads_first)
        answer = whole.view(query.shape) if direct else torch.empty_like(query)
        sums, direct_sums = self._no_lse, False
        if lse is not None:
            direct_sums = queries == 1 and lse[call.start : call.stop].is_contiguous()
            shape = rows, spec.num_heads, queries, 1
            sums = lse[call.start : call.stop].view(shape) if direct_sums else lse.new_empty(shape)
        fused = FusedCall(self._version, query, key, value, arguments, answer, sums)
        if graph is None:
            fused.launch()
        else:
            fused.reserve()
            task = graph.group(fused.launch)
            graph.state.setdefault(self, []).append((task, fused.unowned()))
        if not direct:
            whole.copy_((answer.transpose(1, 2) if heads_first else answer).reshape(whole.shape))
        if lse is not None and not direct_sums:
            lse[call.start : call.stop] = sums.squeeze(-1).transpose(1, 2).reshape(-1, spec.num_heads)

    def _masking(self, call: RowCall) -> dict[str, Any]:
        """What hides keys. With one query per row the operator ignores its sparse modes: the last query sees all that
        the lengths leave, and a window is a mask of the first block."""
        spec = self.spec
        if call.queries == 1:
            return {} if call.mask is None else {"atten_mask": call.mask}
        if spec.window is not None:
            ahead = 0 if spec.causal else spec.window - 1
            found = {"sparse_mode": 4, "pre_tokens": spec.window - 1, "next_tokens": ahead}
        elif spec.causal:
            found = {"sparse_mode": 3}
        else:
            return {}
        # Bit 1: a query whose whole row is masked is set right by the operator, at some cost.
        return {**found, "atten_mask": self._mask, "inner_precise": 2 if call.blind else 0}

    # -- K and V without a cache ------------------------------------------------------------------------------

    def _run_ragged(
        self,
        plan: FusedPlan,
        q: torch.Tensor,
        kv: RaggedKV,
        blind: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """``blind`` [T] bool on the host: queries that see nothing."""
        cu_q, cu_k = plan.batch.host_cu_q.tolist(), kv.host_cu_k.tolist()
        for row in range(plan.batch.num_rows):
            queries, keys = cu_q[row + 1] - cu_q[row], cu_k[row + 1] - cu_k[row]
            if not queries or not keys:
                continue
            begin = 0
            if queries == 1 and self.spec.window is not None:  # modes are ignored for one query: cut instead
                begin = max(0, keys - self.spec.window)
            rows = slice(cu_k[row] + begin, cu_k[row + 1])
            call = RowCall(cu_q[row], cu_q[row + 1], 1, queries, [keys - begin])
            call.blind = bool(blind[call.start : call.stop].any())
            key, value = kv.k[rows].contiguous()[None], kv.v[rows].contiguous()[None]
            arguments = {"actual_seq_lengths_kv": call.kv_lens, "scale": self.spec.scale}
            self._fused(call, q, key, value, arguments, out, lse, None)


class GatheredAttention(FusedAttention):
    """For int8 caches in blocks that the operator does not read: every row's keys are gathered and widened first."""

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return gathered_refusals(query)

    def new_plan(self) -> FusedPlan:
        return GatheredPlan(self.spec, self.group, self.limits, self.device.torch_device)
