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
    GroupView,
    LayerArgs,
    LayerCache,
    Limits,
    Plan,
    attention_kernel,
)
from dougong.plugins import KernelSpec
from dougong_sglang.batch import counted, decodes, pages, table_of
from dougong_sglang.refusals import refuse_call, refuse_layer, refuse_runner

__all__ = ["DougongAttnBackend"]

_SMALL_TABLE = 1 << 15
"""Entries of a block table that cost less to copy than it takes to find out how many are needed."""


@dataclass(eq=False)
class _Step:
    """A batch, and a plan for each kernel that a layer of it has met."""

    batch: BatchView
    plans: dict[AttentionKernel, Plan] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    """What a layer needs in every step, with what it was made from: it is made anew where one of them is another."""

    dtype: torch.dtype
    sinks: Any
    pool: torch.Tensor
    spec: AttentionSpec
    kernel: AttentionKernel
    declared: KernelSpec
    cache: LayerCache
    args: LayerArgs


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
        # The table of requests holds a place for every token; each page's first says which page it is.
        self.columns: torch.Tensor = runner.req_to_token_pool.req_to_token[:, :: self.page][:, : self.limits.max_blocks]
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        self.host_cu_q = torch.arange(rows + 1, dtype=torch.int32)
        self.kernels: dict[AttentionSpec, tuple[AttentionKernel, KernelSpec]] = {}
        self.needs_lengths = False
        """Whether one of the kernels wants exact lengths on the host."""
        self.layers: dict[int, _Layer] = {}
        self.buffers: _Buffers | None = None
        self.captured: dict[int, _Step] = {}
        self.step: _Step | None = None

    # -- metadata ----------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once per step that runs without a graph."""
        rows: int = forward_batch.batch_size
        longest, host = self._longest(forward_batch), forward_batch.seq_lens_cpu
        group = GroupView(
            kv_len=forward_batch.seq_lens[:rows].to(torch.int32),
            host_kv_len=None if host is None else host[:rows].to(torch.int32),
            max_kv_len=longest,
            block_table=table_of(
                self.columns, forward_batch.req_pool_indices[:rows], -(-longest // self.page), self.page
            ),
            slots=forward_batch.out_cache_loc.to(torch.int64),
        )
        if forward_batch.forward_mode.is_decode_or_idle():
            self.step = _Step(decodes(group, self.cu_q[: rows + 1], self.host_cu_q[: rows + 1]))
        else:
            self.step = _Step(counted(group, forward_batch, self.device))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.buffers = _Buffers(
            torch.arange(max_bs + 1, dtype=torch.int32, device=self.device),
            torch.ones(max_bs, dtype=torch.int32, device=self.device),
            torch.zeros((max_bs, self.limits.max_blocks), dtype=torch.int32, device=self.device),
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph of decodes is captured, and before each of its replays, which must find the host quick.

        A captured batch is the same object in all its replays: what it points at is refreshed.
        """
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise ValueError("dougong's attention backend is captured for decodes only")
        rows: int = forward_batch.batch_size
        if in_capture:
            self.captured[rows] = self._capture(rows)
        step = self.captured[rows]
        group = step.batch.groups[0]
        group.slots = forward_batch.out_cache_loc
        if in_capture or self.needs_lengths:
            host = forward_batch.seq_lens_cpu
            group.host_kv_len = None if host is None else host[:rows].to(torch.int32)
        lengths, requests = forward_batch.seq_lens, forward_batch.req_pool_indices
        group.kv_len.copy_(lengths if lengths.shape[0] == rows else lengths[:rows])
        width = self.limits.max_blocks
        if rows * width > _SMALL_TABLE:
            width = -(-self._longest(forward_batch) // self.page)
        requests = requests if requests.shape[0] == rows else requests[:rows]
        table_of(self.columns, requests, width, self.page, group.block_table)
        if step.plans:
            self._refuse_unknown_lengths(group)
        for kernel, plan in step.plans.items():  # those that its layers made while it was captured
            kernel.plan(step.batch, plan)
        self.step = step

    def _capture(self, rows: int) -> _Step:
        buffers = self.buffers
        assert buffers is not None
        group = GroupView(
            kv_len=buffers.kv_len[:rows],
            host_kv_len=None,
            max_kv_len=self.context,
            block_table=buffers.table[:rows],
            slots=buffers.cu_q[:0],
        )
        return _Step(decodes(group, buffers.cu_q[: rows + 1], torch.arange(rows + 1, dtype=torch.int32)))

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
        if given:
            refuse_call(layer, given)
        known = self._layer(layer, q.dtype, sinks)
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        step = self.step
        assert step is not None
        plan = step.plans.get(known.kernel) or self._plan(step, known)
        spec, tokens = known.spec, step.batch.num_tokens
        q = q.reshape(-1, spec.num_heads, spec.head_dim)
        padded = q.shape[0]
        out = q.new_empty((padded, spec.num_heads, spec.head_dim_v))
        if padded == tokens:
            known.kernel.run(plan, known.args, q, known.cache, out=out)
        else:
            out[tokens:].zero_()
            known.kernel.run(plan, known.args, q[:tokens], known.cache, out=out[:tokens])
        return out.view(padded, -1)

    def _layer(self, layer: Any, dtype: torch.dtype, sinks: Any) -> _Layer:
        pool = self.pool.get_key_buffer(layer.layer_id)  # in every step: it may wait for what is still being loaded
        known = self.layers.get(layer.layer_id)
        if known is not None and known.dtype is dtype and known.sinks is sinks:
            if known.pool is pool or known.pool.data_ptr() == pool.data_ptr():
                return known
        refuse_layer(layer)
        spec = self._spec(layer, dtype, sinks)
        kernel, declared = self._kernel(spec)
        args = LayerArgs(sinks=None if sinks is None else sinks.detach().to(self.device, torch.float32))
        known = _Layer(dtype, sinks, pool, spec, kernel, declared, self._cache(layer.layer_id, pool, spec), args)
        self.layers[layer.layer_id] = known
        return known

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

    def _kernel(self, spec: AttentionSpec) -> tuple[AttentionKernel, KernelSpec]:
        found = self.kernels.get(spec)
        if found is None:
            self._refuse_capturing()
            try:
                found = attention_kernel(
                    spec, block_size=self.page, limits=self.limits, device=self.device, strided=False
                )
            except DougongError as error:
                raise ValueError(f"dougong's attention backend cannot run this layer. {error}") from error
            self.kernels[spec] = found
            self.needs_lengths |= found[1].needs_host_lengths
        return found

    def _plan(self, step: _Step, layer: _Layer) -> Plan:
        """The first layer of its kind in a step plans for all of them."""
        self._refuse_capturing()
        captured = step in self.captured.values()
        if captured and layer.declared.graph != "capture":
            raise ValueError(
                f"dougong's kernel {layer.declared.provider} cannot be captured in a graph here; start with "
                "--disable-cuda-graph."
            )
        self._refuse_unknown_lengths(step.batch.groups[0])
        plan = layer.kernel.new_plan()
        layer.kernel.plan(step.batch, plan)
        step.plans[layer.kernel] = plan
        return plan

    def _refuse_unknown_lengths(self, group: GroupView) -> None:
        if self.needs_lengths and group.host_kv_len is None:
            raise ValueError(
                "a kernel that dougong's attention backend chose for this device needs the lengths of sequences on the "
                "host, and SGLang keeps none for this batch. Choose another attention backend."
            )

    def _refuse_capturing(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("dougong: a kind of attention layer that the warm-up did not meet is being captured")

    def _cache(self, layer_id: int, k: torch.Tensor, spec: AttentionSpec) -> LayerCache:
        if k.dim() != 3:
            raise ValueError(f"dougong's attention backend reads pools [places, heads, dim], not {list(k.shape)}")
        v = self.pool.get_value_buffer(layer_id)
        return LayerCache({"k": pages(k, self.page), "v": pages(v, self.page)}, NHD, self.page, spec)
