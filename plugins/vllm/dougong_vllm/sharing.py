"""Decode context parallelism: ranks of a group hold shares of each sequence's KV, and merge what each sees by LSE.

A rank's cache has its share of the tokens of earlier steps. All ranks gather the group's queries, attend over their
shares without a mask, and combine: each gets its own heads' answer over all shares. The step's own keys every rank has
whole; attention among them, causal, is merged in last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_dcp_group
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

from dougong.hal import (
    AttentionKernel,
    AttentionSpec,
    BatchView,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    RaggedKV,
    attention_kernel,
    backend_for,
)

__all__ = ["Sharing", "SharedStep", "combination", "ranks"]


def ranks() -> tuple[int, int]:
    """(how many ranks share a sequence, which one this is)."""
    try:
        group = get_dcp_group()
    except AssertionError:  # vLLM's own: no groups were made, as in a process without its engine
        return 1, 0
    return group.world_size, group.rank_in_group


def combination(vllm_config: Any) -> Any:
    """vLLM's function that merges (out [T, H, D], lse [T, H], group, return_lse=True) over the ranks."""
    if getattr(vllm_config.parallel_config, "dcp_comm_backend", "ag_rs") == "a2a":
        from vllm.v1.attention.ops.dcp_alltoall import dcp_a2a_lse_reduce

        return dcp_a2a_lse_reduce
    from vllm.v1.attention.ops.common import cp_lse_ag_out_rs

    return cp_lse_ag_out_rs


@dataclass
class SharedStep:
    """One step of one KV group, in all kinds of its layers: see `Sharing.plan`."""

    sharing: Sharing
    batch: BatchView
    plans: dict[AttentionSpec, tuple[Plan, Plan]]
    has_context: bool

    def attend(
        self,
        spec: AttentionSpec,
        args: LayerArgs,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        """q and out [T, H, D], k and v [T, K, D], all of this rank's heads; the step's tokens are written already."""
        whole, own = self.sharing.kernels[spec]
        whole_plan, own_plan = self.plans[spec]
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        kv = RaggedKV(k, v, self.batch.cu_q, self.batch.host_cu_q)
        own.run(own_plan, args, q, kv, out=out, lse=lse)
        if not self.has_context:
            return
        group = get_dcp_group()
        gathered = group.all_gather(q.contiguous(), dim=1)
        seen = torch.empty_like(gathered)
        seen_lse = torch.empty(gathered.shape[:2], dtype=torch.float32, device=q.device)
        whole.run(whole_plan, args, gathered, cache, out=seen, lse=seen_lse)
        seen, seen_lse = self.sharing.combine(seen, seen_lse, group, return_lse=True)
        merged, _ = self.sharing.merge(seen, seen_lse, out, lse)
        out.copy_(merged)


class Sharing:
    """What a KV group's layers need beyond their kernels where its sequences are shared by ranks.

    Args:
        specs: of the layers, with this rank's heads.
        limits: of this rank's batches.

    Raises:
        KernelSelectionError: no kernel gives the LSE, without a mask over a cache and causally without one.
    """

    def __init__(
        self, specs: list[AttentionSpec], block_size: int, limits: Limits, vllm_config: Any, device: torch.device
    ) -> None:
        self.world, self.rank = ranks()
        self.interleave = int(getattr(vllm_config.parallel_config, "cp_kv_cache_interleave_size", 1))
        self.kernels: dict[AttentionSpec, tuple[AttentionKernel, AttentionKernel]] = {}
        for spec in specs:
            every = replace(spec, num_heads=spec.num_heads * self.world, causal=False, lse=True)
            whole, _ = attention_kernel(every, block_size=block_size, limits=limits, device=device)
            step = replace(limits, max_kv_len=limits.max_tokens)
            own, _ = attention_kernel(
                replace(spec, lse=True), block_size=block_size, limits=step, device=device, ragged=True
            )
            self.kernels[spec] = whole, own
        self.combine = combination(vllm_config)
        self.merge = backend_for(device).op_table(specs[0].dtype).merge_lse
        # Graphs read them where they lay in the capture.
        self.shares = torch.zeros(limits.max_rows, dtype=torch.int32, device=device)
        self.counts = torch.zeros(limits.max_rows, dtype=torch.int32, device=device)

    def new_plans(self) -> dict[AttentionSpec, tuple[Plan, Plan]]:
        return {spec: (whole.new_plan(), own.new_plan()) for spec, (whole, own) in self.kernels.items()}

    def plan(
        self, common: Any, batch: BatchView, plans: dict[AttentionSpec, tuple[Plan, Plan]], *, captured: bool
    ) -> SharedStep:
        """``batch`` is the step with the lengths of whole sequences, ``common`` what vLLM says of it.

        A captured graph keeps both parts: its replays may have a context where the batch of its capture had none.
        """
        group = batch.groups[0]
        rows = batch.num_rows
        counts, shares = self.counts[:rows], self.shares[:rows]
        torch.sub(batch.cu_q[1:], batch.cu_q[:-1], out=counts)
        earlier = (group.kv_len - counts).clamp(min=0)  # rows of a capture may say anything
        shares.copy_(get_dcp_local_seq_lens(earlier, self.world, self.rank, self.interleave))
        bound = -(-group.max_kv_len // (self.world * self.interleave)) * self.interleave
        context = replace(batch, groups=(replace(group, kv_len=shares, host_kv_len=None, max_kv_len=bound),))
        fresh = replace(group, kv_len=counts, host_kv_len=None, max_kv_len=batch.max_q_len)
        own = replace(batch, groups=(fresh,))
        has_context = captured or self._has_context(common, batch)
        for spec, (whole_plan, own_plan) in plans.items():
            if has_context:
                self.kernels[spec][0].plan(context, whole_plan)
            self.kernels[spec][1].plan(own, own_plan)
        return SharedStep(self, batch, plans, has_context)

    @staticmethod
    def _has_context(common: Any, batch: BatchView) -> bool:
        """From what all ranks know alike: they must agree on whether they gather. A bound may say yes for no."""
        bounds = common.seq_lens_cpu_upper_bound
        if bounds is None:
            return True
        counts = batch.host_cu_q[1:] - batch.host_cu_q[:-1]
        return bool((bounds[: batch.num_rows].to(counts.dtype) > counts).any())
