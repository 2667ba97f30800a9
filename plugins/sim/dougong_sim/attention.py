"""Paged attention as one operator that takes the lengths from the host, as several vendors' operators do.

The arithmetic is the core's torch reference, run on the CPU over the device's own memory. What is the device's is the
form: lengths are lists of host integers, so a captured graph keeps those of its capture until ``update_graph``.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import torch

from dougong.hal import (
    NHD,
    AttentionSpec,
    BatchView,
    Device,
    Graph,
    GroupView,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    RaggedKV,
)
from dougong.hal.reference.attention import ReferenceAttention, ReferencePlan
from dougong_sim.graphs import SimGraph

__all__ = ["SimAttention"]

_kernels: weakref.WeakValueDictionary[int, SimAttention] = weakref.WeakValueDictionary()
_next_id = itertools.count()


@dataclass(frozen=True, slots=True)
class _Task:
    """One layer's call in a graph: its handle, and the tensors it was captured with."""

    handle: int
    layer: LayerArgs
    q: torch.Tensor
    kv: LayerCache
    out: torch.Tensor
    lse: torch.Tensor | None


class SimAttention(ReferenceAttention):
    """The reference behind ``torch.ops.dougong_sim.paged_attention``."""

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._id = next(_next_id)  # an operator takes numbers and tensors, so the kernel travels as its number
        _kernels[self._id] = self

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
        assert isinstance(kv, LayerCache), "K and V without a cache were not among the declared features"
        graph = SimGraph.capturing()
        if graph is None:
            self._launch(plan, layer, q, kv, out, lse)
            return
        with graph.group() as handle:
            self._launch(plan, layer, q, kv, out, lse)
        # Without ownership: these lie in the graph's pool, where later layers use the same memory again.
        unowned = torch.ops.dougong_sim.unowned
        task = _Task(handle, layer, unowned(q), kv, unowned(out), None if lse is None else unowned(lse))
        graph.state.setdefault(self, []).append(task)

    def update_graph(self, graph: Graph, plan: Plan) -> None:
        assert isinstance(graph, SimGraph)
        for task in graph.state.get(self, ()):
            with graph.update(task.handle):
                self._launch(plan, task.layer, task.q, task.kv, task.out, task.lse)

    def _launch(
        self,
        plan: Plan,
        layer: LayerArgs,
        q: torch.Tensor,
        kv: LayerCache,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        assert isinstance(plan, ReferencePlan)
        table = plan.batch.groups[self.group.index].block_table
        torch.ops.dougong_sim.paged_attention(
            q, kv.k, kv.v, table, plan.cu_q, plan.kv_len, plan.batch.num_decode_rows, self._id,
            layer.sinks if self.spec.sinks else None, layer.slopes if self.spec.alibi else None, out, lse,
        )  # fmt: skip

    def compute(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        cu_q: list[int],
        kv_len: list[int],
        num_decode_rows: int,
        layer: LayerArgs,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """The operator's kernel. Every tensor is a CPU tensor over device memory."""
        lengths = torch.tensor(kv_len, dtype=torch.int32)
        prefix = torch.tensor(cu_q, dtype=torch.int32)
        nothing = torch.empty(0, dtype=torch.int64)
        view = GroupView(lengths, lengths, max(kv_len, default=0), table, nothing)
        plan = ReferencePlan()
        plan.cu_q, plan.kv_len = cu_q, kv_len
        plan.batch = BatchView(
            num_rows=len(kv_len),
            num_tokens=q.shape[0],
            num_decode_rows=num_decode_rows,
            max_q_len=max((b - a for a, b in itertools.pairwise(cu_q)), default=0),
            cu_q=prefix,
            host_cu_q=prefix,
            groups=(view,) * (self.group.index + 1),
        )
        cache = LayerCache({"k": k, "v": v}, NHD, k.shape[1], self.spec)
        super().run(plan, layer, q, cache, out=out, lse=lse)


def _paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    cu_q: list[int],
    kv_len: list[int],
    num_decode_rows: int,
    kernel: int,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    layer = LayerArgs(sinks=sinks, slopes=slopes)
    _kernels[kernel].compute(q, k, v, table, list(cu_q), list(kv_len), num_decode_rows, layer, out, lse)


# Registered for the CPU: the device's fallback calls it with CPU tensors over device memory, now and at every replay.
_library = torch.library.Library("dougong_sim", "FRAGMENT")
_library.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor table, int[] cu_q, int[] kv_len, int num_decode_rows,"
    " int kernel, Tensor? sinks, Tensor? slopes, Tensor(a!) out, Tensor(b!)? lse) -> ()"
)
_library.impl("paged_attention", _paged_attention, "CPU")
