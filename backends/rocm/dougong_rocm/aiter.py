"""Attention through AMD's aiter: its paged operator for decodes, its varlen operator for all other rows.

Signatures: ``torch.ops.aiter.paged_attention_v1`` and ``aiter.flash_attn_varlen_func`` of aiter 0.1. The paged operator
takes caches in "b n h d"; rows of several queries have their keys gathered into one dense run first, which is what the
varlen operator is fastest on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from dougong.hal import (
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Device,
    KVGroup,
    KVLayout,
    LayerArgs,
    LayerCache,
    Limits,
    OneOf,
    Plan,
    RaggedKV,
    Refusal,
)
from dougong_kernels.dense import DenseKeys, dense_keys
from dougong_kernels.ops.write import write

if TYPE_CHECKING:
    from collections.abc import Iterator
from dougong_kernels.library import unusable

__all__ = ["AITER_NHD", "AiterAttention", "sdk"]

AITER_NHD = KVLayout("nhd", block_sizes=OneOf((16, 32)), default_block=16)
_TARGETS = ("gfx942", "gfx950")
_HEAD_DIMS = (64, 128, 256)
_MAX_RATIO = 16
_PARTITION = 256
"""Keys that one program of the paged operator reads; its workspace holds a partial result for each."""


def sdk() -> Any:
    """The module ``aiter``, with its operators registered.

    Raises:
        ImportError: it is not installed, does not fit this torch, or lacks an operator that is used here.
    """
    try:
        module = importlib.import_module("aiter")
    except OSError as error:  # a library built for another torch or ROCm
        raise ImportError(f"aiter does not fit torch {torch.__version__}: {error}") from error
    if not hasattr(module, "flash_attn_varlen_func") or not hasattr(torch.ops.aiter, "paged_attention_v1"):
        raise ImportError("aiter is too old: it has no flash_attn_varlen_func or no paged_attention_v1 (0.1 has both)")
    return module


class AiterPlan(Plan):
    """One step. ``blind`` [tokens, 1, 1] bool marks queries that see nothing; ``dense`` holds the keys of rows that are
    no decodes."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.blind = torch.zeros(max_tokens, 1, 1, dtype=torch.bool, device=device)
        self.decodes = 0
        self.dense: DenseKeys | None = None


class AiterAttention(AttentionKernel):
    """aiter's operators. Needs host lengths for rows of several queries; graphs hold decodes only."""

    layouts = (AITER_NHD,)

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: Device) -> None:
        super().__init__(spec, group, limits, device)
        self._sdk = sdk()
        self._unit = torch.ones(1, dtype=torch.float32, device=device.torch_device)

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        target = str(getattr(getattr(device, "target", None), "name", "no gfx target"))
        return (*_refusals(query, target), *unusable(sdk))

    def new_plan(self) -> AiterPlan:
        return AiterPlan(self.limits.max_tokens, self.device.torch_device)

    def plan(self, batch: BatchView, into: Plan) -> None:
        assert isinstance(into, AiterPlan)
        into.batch, into.decodes = batch, batch.num_decode_rows
        view = batch.groups[self.group.index]
        into.blind[: batch.num_tokens].copy_(batch.blind(self.spec, view.kv_len)[:, None, None])
        into.dense = dense_keys(batch, view, self.group.kernel_block, into.decodes)

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
        assert isinstance(plan, AiterPlan)
        batch = plan.batch
        if isinstance(kv, RaggedKV):
            max_k = int(kv.host_lengths.max()) if batch.num_rows else 0
            self._varlen(q, kv.k, kv.v, batch.cu_q, kv.cu_k, batch.max_q_len, max_k, out)
            out.masked_fill_(batch.blind(self.spec, kv.lengths)[:, None, None], 0)
            return
        if plan.decodes:
            self._paged(plan, q[: plan.decodes], kv, out[: plan.decodes])
        if plan.dense is not None:
            dense = plan.dense
            k, v = kv.read(dense.slots)
            start = plan.decodes
            self._varlen(q[start:], k, v, dense.cu_q, dense.cu_k, dense.max_q, dense.max_k, out[start:])
        out.masked_fill_(plan.blind[: out.shape[0]], 0)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)

    def _paged(self, plan: AiterPlan, q: torch.Tensor, kv: LayerCache, out: torch.Tensor) -> None:
        view, spec, rows = plan.batch.groups[self.group.index], self.spec, plan.decodes
        longest = max(1, view.max_kv_len)
        parts = -(-longest // _PARTITION)
        size = rows * spec.num_heads * parts * (spec.head_dim * q.itemsize + 8)
        # Anew for each call: one that is kept and grows would be freed under the graphs that captured it.
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
        answer = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        torch.ops.aiter.paged_attention_v1(
            answer, workspace, q if q.stride(1) == q.shape[2] else q.contiguous(), kv.k, kv.v, spec.scale,
            view.block_table[:rows], None, view.kv_len[:rows], longest, None, "auto", "NHD", spec.softcap or 0.0,
            self._unit, self._unit,
        )  # fmt: skip
        if answer is not out:
            out.copy_(answer)

    def _varlen(
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
        if not max_q or not max_k:
            out.zero_()
            return
        answer = self._sdk.flash_attn_varlen_func(
            q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, max_q, max_k,
            softmax_scale=self.spec.scale, logits_soft_cap=self.spec.softcap or 0.0, causal=self.spec.causal,
        )  # fmt: skip
        out.copy_(answer)


def _refusals(query: AttentionQuery, target: str) -> Iterator[Refusal]:
    spec = query.spec
    if target not in _TARGETS:
        yield Refusal(f"aiter is built for {' and '.join(_TARGETS)}, not for {target}", "the triton provider")
    if spec.dtype not in (torch.bfloat16, torch.float16):
        yield Refusal(f"dtype {spec.dtype}", "bfloat16 or float16")
    if spec.kv_dtype != spec.dtype:
        yield Refusal(f"a cache in {spec.kv_dtype} under queries in {spec.dtype}", "the triton provider")
    if spec.head_dim not in _HEAD_DIMS or spec.head_dim_v != spec.head_dim:
        nearest = min(_HEAD_DIMS, key=lambda dim: abs(dim - spec.head_dim))
        yield Refusal(f"head dim {spec.head_dim}/{spec.head_dim_v}: 64, 128 or 256, K and V alike", str(nearest))
    if spec.group_size > _MAX_RATIO:
        yield Refusal(f"{spec.group_size} query heads per kv head: at most {_MAX_RATIO}", str(_MAX_RATIO))
    for asked, what in (
        (spec.window is not None, "a window"), (spec.sinks, "sinks"), (spec.alibi, "ALiBi"), (spec.lse, "LSE"),
        (spec.latent, "a latent cache"), (query.batch_invariant, "batch invariance"),
        (not spec.causal and not query.ragged, "no mask over a cache"),
    ):  # fmt: skip
        if asked:
            yield Refusal(what, "the triton provider")
    if query.ragged:
        return
    if query.layout.name != AITER_NHD.name:
        yield Refusal(f"KV layout {query.layout.name}", AITER_NHD.name)
    if not AITER_NHD.block_sizes.allows(query.block_size):
        yield Refusal(f"block size {query.block_size}: 16 or 32", str(AITER_NHD.block_sizes.nearest(query.block_size)))
