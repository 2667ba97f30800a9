"""One step's metadata: the batch in dougong's terms, and a plan per kind of layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from dougong.errors import DougongError
from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Limits,
    Plan,
    attention_kernel,
    backend_for,
)
from dougong.plugins import KernelSpec
from dougong_vllm.batch import to_batch, without_negatives
from dougong_vllm.sharing import SharedStep, Sharing, ranks

__all__ = ["DougongMetadata", "DougongMetadataBuilder"]


@dataclass
class DougongMetadata(AttentionMetadata):  # type: ignore[misc]
    """What layers read in ``forward``. ``kinds``: by a layer's ``kind``, the kernel and its plan of this step."""

    batch: BatchView
    slots: torch.Tensor
    kinds: tuple[tuple[AttentionKernel, Plan | None], ...]
    num_actual_tokens: int
    shared: SharedStep | None = None
    """Where ranks share sequences: attention then goes through it."""


@dataclass(frozen=True)
class _Held:
    """What a captured graph holds, and all steps without one share: plans, and where slots lie.

    ``shared``: where ranks share sequences, both plans of a layer's spec; ``kinds`` then have none. ``slots`` and
    ``places`` (see `without_negatives`): as long as the graph's tokens, or as any step's.
    """

    kinds: tuple[tuple[AttentionKernel, Plan | None], ...]
    shared: dict[AttentionSpec, tuple[Plan, Plan]]
    slots: torch.Tensor
    places: torch.Tensor


class DougongMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Called once per step and KV group, outside graphs.

    A captured graph keeps the plans it was captured with, and their buffers' addresses. vLLM replays it for batches
    padded to the same numbers of rows and tokens, so plans are kept by these.
    """

    # Decodes first: the batch's order in dougong's contract.
    reorder_batch_threshold: int | None = 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """What the kernel declares of itself; no graph where none can be asked."""
        try:
            declared = _declared(kv_cache_spec, vllm_config)
        except DougongError:
            return AttentionCGSupport.NEVER
        if declared.graph != "capture":  # "update" needs a call before each replay, for which vLLM has no place
            return AttentionCGSupport.NEVER
        if declared.graph_batches == "decode":
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size: int = kv_cache_spec.block_size
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        self.limits = Limits(
            max_rows=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            max_kv_len=model.max_model_len,
            max_blocks=-(-model.max_model_len // self.block_size),
        )
        impls = [
            layer.impl for layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).values()
        ]
        self.kernels = self._make(impl.spec for impl in impls)
        kinds = {spec: kind for kind, spec in enumerate(self.kernels)}
        for impl in impls:  # a step's layers find their kernel by number: a spec takes microseconds to hash
            impl.kind = kinds[impl.spec]
        self.sharing: Sharing | None = None
        if ranks()[0] > 1:
            self.sharing = Sharing(list(self.kernels), self.block_size, self.limits, vllm_config, device)
        self.slots = torch.zeros(scheduler.max_num_batched_tokens, dtype=torch.int64, device=device)
        self.places = torch.arange(scheduler.max_num_batched_tokens, device=device) % self.block_size
        self.eager = self._hold(scheduler.max_num_batched_tokens)
        self.captured: dict[tuple[int, int, int], _Held] = {}

    def _make(self, specs: Iterable[AttentionSpec]) -> dict[AttentionSpec, AttentionKernel]:
        kernels: dict[AttentionSpec, AttentionKernel] = {}
        for spec in specs:
            if spec in kernels:
                continue
            kernel, declared = attention_kernel(
                spec, block_size=self.block_size, limits=self.limits, device=self.device
            )
            if declared.needs_host_lengths:
                raise ValueError(
                    f"dougong's kernel {declared.provider} needs exact lengths on the host, which vLLM does not have. "
                    "Choose another attention backend."
                )
            kernels[spec] = kernel
        return kernels

    def _hold(self, tokens: int) -> _Held:
        slots, places = self.slots[:tokens], self.places[:tokens]
        if self.sharing is not None:
            return _Held(tuple((one, None) for one in self.kernels.values()), self.sharing.new_plans(), slots, places)
        return _Held(tuple((one, one.new_plan()) for one in self.kernels.values()), {}, slots, places)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DougongMetadata:
        """Once per step. ``common_prefix_len`` is what cascade attention would share; it is not used here."""
        return self._build(common_attn_metadata, self.captured.get(_shape(common_attn_metadata)))

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> DougongMetadata:
        shape = _shape(common_attn_metadata)
        held = self.captured.get(shape)
        if held is None:
            held = self.captured[shape] = self._hold(common_attn_metadata.num_actual_tokens)
        return self._build(common_attn_metadata, held)

    def _build(self, common: Any, captured: _Held | None) -> DougongMetadata:
        if common.causal is not True:
            raise NotImplementedError("dougong's attention backend is causal; this batch asks for other masks")
        if common.mm_req_doc_ranges is not None or common.rswa_prefix_lens is not None:
            raise NotImplementedError("dougong's attention backend has no prefix that all tokens see")
        tokens: int = common.num_actual_tokens
        held = captured or self.eager
        slots, places = held.slots, held.places
        if captured is None:
            slots, places = slots[:tokens], places[:tokens]
        mapping = common.slot_mapping
        without_negatives(mapping if mapping.shape[0] == tokens else mapping[:tokens], places, out=slots)
        batch = to_batch(common, slots, stays=captured is not None)
        if captured is not None:  # a graph's bound holds for all its replays
            batch.groups[0].max_kv_len = self.limits.max_kv_len
        if self.sharing is not None:
            shared = self.sharing.plan(common, batch, held.shared, captured=captured is not None)
            return DougongMetadata(batch, slots, held.kinds, tokens, shared)
        for kernel, plan in held.kinds:
            assert plan is not None
            kernel.plan(batch, plan)
        return DougongMetadata(batch, slots, held.kinds, tokens)


def _shape(common: Any) -> tuple[int, int, int]:
    """What tells one captured graph from another."""
    return common.num_reqs, common.num_actual_tokens, common.max_query_len


def _declared(kv_cache_spec: Any, vllm_config: Any) -> KernelSpec:
    """The declaration of the kernel that a plain layer of this KV group would get."""
    from vllm.platforms import current_platform

    spec = AttentionSpec(
        num_heads=kv_cache_spec.num_kv_heads,
        num_kv_heads=kv_cache_spec.num_kv_heads,
        head_dim=kv_cache_spec.head_size,
        window=getattr(kv_cache_spec, "sliding_window", None),
        dtype=kv_cache_spec.dtype,
    )
    query = AttentionQuery(spec=spec, layout=NHD, block_size=kv_cache_spec.block_size, strided=True)
    return backend_for(torch.device(current_platform.device_type)).choose_attention(query).spec
