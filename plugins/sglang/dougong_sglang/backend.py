"""The attention backend that SGLang makes: one per model runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from dougong.errors import DougongError
from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionSpec,
    BatchView,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    attention_kernel,
)
from dougong.plugins import KernelSpec
from dougong_sglang.batch import pages, table_of, to_batch
from dougong_sglang.refusals import refuse_layer, refuse_runner

__all__ = ["DougongAttnBackend"]


@dataclass(eq=False)
class _Step:
    """A batch, and a plan for each kind of layer that has met it."""

    batch: BatchView
    plans: dict[AttentionSpec, Plan] = field(default_factory=dict)


@dataclass
class _Buffers:
    """Metadata of captured graphs: addresses that stay."""

    cu_q: torch.Tensor
    kv_len: torch.Tensor
    table: torch.Tensor


class DougongAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Paged attention of dougong's kernels over SGLang's own pools; SGLang writes them, these kernels read.

    Raises:
        ValueError: the runner asks for something that this backend has not (see `refusals`).
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        refuse_runner(runner)
        self.device = torch.device(runner.device)
        self.pool = runner.token_to_kv_pool
        self.req_to_token: torch.Tensor = runner.req_to_token_pool.req_to_token
        self.page: int = getattr(runner, "page_size", 1) or 1
        self.context: int = runner.model_config.context_len
        rows = int(runner.req_to_token_pool.size)
        tokens = int(getattr(runner, "max_total_num_tokens", 0) or 0)
        chunk = int(getattr(runner.server_args, "chunked_prefill_size", 0) or 0)
        self.limits = Limits(
            max_rows=rows,
            max_tokens=max(rows, chunk if chunk > 0 else max(tokens, self.context)) + rows,
            max_kv_len=self.context,
            max_blocks=-(-self.context // self.page),
        )
        self.kernels: dict[AttentionSpec, tuple[AttentionKernel, KernelSpec]] = {}
        self.caches: dict[int, tuple[torch.Tensor, LayerCache]] = {}
        self.args: dict[int, tuple[Any, LayerArgs]] = {}
        self.buffers: _Buffers | None = None
        self.captured: dict[int, _Step] = {}
        self.step: _Step | None = None

    # -- metadata ----------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once per step that runs without a graph."""
        rows: int = forward_batch.batch_size
        longest = self._longest(forward_batch)
        table = table_of(self.req_to_token, forward_batch.req_pool_indices[:rows], -(-longest // self.page), self.page)
        kv_len = forward_batch.seq_lens[:rows].to(torch.int32)
        cu_q = torch.zeros(rows + 1, dtype=torch.int32, device=self.device)
        if forward_batch.forward_mode.is_decode_or_idle():
            torch.arange(rows + 1, dtype=torch.int32, out=cu_q)
        else:
            cu_q[1:] = forward_batch.extend_seq_lens[:rows].cumsum(0)
        self.step = _Step(to_batch(forward_batch, table, kv_len, cu_q, longest))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.buffers = _Buffers(
            torch.arange(max_bs + 1, dtype=torch.int32, device=self.device),
            torch.ones(max_bs, dtype=torch.int32, device=self.device),
            torch.zeros((max_bs, self.limits.max_blocks), dtype=torch.int32, device=self.device),
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph of decodes is captured, and before each of its replays."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise ValueError("dougong's attention backend is captured for decodes only")
        assert self.buffers is not None
        rows: int = forward_batch.batch_size
        buffers = self.buffers
        buffers.kv_len[:rows] = forward_batch.seq_lens[:rows].to(torch.int32)
        table_of(
            self.req_to_token, forward_batch.req_pool_indices[:rows], self.limits.max_blocks, self.page, buffers.table
        )
        batch = to_batch(
            forward_batch, buffers.table[:rows], buffers.kv_len[:rows], buffers.cu_q[: rows + 1], self.context
        )
        if in_capture:
            self.captured[rows] = _Step(batch)
        step = self.captured[rows]
        step.batch = batch
        for spec, plan in step.plans.items():  # those that its layers made while it was captured
            self.kernels[spec][0].plan(batch, plan)
        self.step = step

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _longest(self, forward_batch: Any) -> int:
        """A bound on the rows' lengths, without waiting for the device."""
        host = forward_batch.seq_lens_cpu
        rows: int = forward_batch.batch_size
        return self.context if host is None or not rows else max(1, int(host[:rows].max()))

    # -- layers ------------------------------------------------------------------------------------------

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **given: Any
    ) -> torch.Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, given)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **given: Any
    ) -> torch.Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, given)

    def _forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool, given: dict[str, Any]
    ) -> torch.Tensor:
        """q [T, H·D], k [T, K, D], v [T, K, Dv] -> [T, H·Dv]."""
        sinks = given.pop("sinks", None)
        refuse_layer(layer, given)
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        spec = self._spec(layer, q.dtype, sinks)
        cache = self._cache(layer.layer_id, spec)
        kernel, plan = self._planned(spec)
        assert self.step is not None
        tokens = self.step.batch.num_tokens
        q = q.reshape(-1, spec.num_heads, spec.head_dim)
        out = q.new_zeros((q.shape[0], spec.num_heads, spec.head_dim_v))
        kernel.run(plan, self._args(layer.layer_id, sinks), q[:tokens], cache, out=out[:tokens])
        return out.view(q.shape[0], -1)

    def _spec(self, layer: Any, dtype: torch.dtype, sinks: Any) -> AttentionSpec:
        window = layer.sliding_window_size  # SGLang counts the tokens before the query's own
        return AttentionSpec(
            num_heads=layer.tp_q_head_num,
            num_kv_heads=layer.tp_k_head_num,
            head_dim=layer.qk_head_dim,
            head_dim_v=layer.v_head_dim,
            scale=float(layer.scaling),
            window=window + 1 if window is not None and window > -1 else None,
            softcap=layer.logit_cap or None,
            sinks=sinks is not None,
            dtype=dtype,
        )

    def _planned(self, spec: AttentionSpec) -> tuple[AttentionKernel, Plan]:
        step = self.step
        assert step is not None
        found = self.kernels.get(spec)
        plan = step.plans.get(spec)
        if found is not None and plan is not None:
            return found[0], plan
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            raise ValueError("dougong: a kind of attention layer that the warm-up did not meet is being captured")
        if found is None:
            try:
                found = attention_kernel(
                    spec, block_size=self.page, limits=self.limits, device=self.device, strided=False
                )
            except DougongError as error:
                raise ValueError(f"dougong's attention backend cannot run this layer. {error}") from error
            self.kernels[spec] = found
        kernel, declared = found
        if declared.graph != "capture" and step in self.captured.values():
            raise ValueError(
                f"dougong's kernel {declared.provider} cannot be captured in a graph here; start with "
                "--disable-cuda-graph."
            )
        plan = step.plans[spec] = kernel.new_plan()
        kernel.plan(step.batch, plan)
        return kernel, plan

    def _cache(self, layer_id: int, spec: AttentionSpec) -> LayerCache:
        k = self.pool.get_key_buffer(layer_id)
        v = self.pool.get_value_buffer(layer_id)
        known = self.caches.get(layer_id)
        if known is None or known[0].data_ptr() != k.data_ptr() or known[1].spec != spec:
            if k.dim() != 3:
                raise ValueError(f"dougong's attention backend reads pools [places, heads, dim], not {list(k.shape)}")
            planes = {"k": pages(k, self.page), "v": pages(v, self.page)}
            known = self.caches[layer_id] = k, LayerCache(planes, NHD, self.page, spec)
        return known[1]

    def _args(self, layer_id: int, sinks: Any) -> LayerArgs:
        known = self.args.get(layer_id)
        if known is None or known[0] is not sinks:
            known = self.args[layer_id] = (
                sinks,
                LayerArgs(sinks=None if sinks is None else sinks.detach().to(self.device, torch.float32)),
            )
        return known[1]
