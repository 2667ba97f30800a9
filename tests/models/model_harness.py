"""Drives a model over a paged cache by hand: what the runner does, in the least code."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

from dougong.hal import (
    NHD,
    AttentionQuery,
    Backend,
    BatchView,
    Collectives,
    Device,
    KVGroup,
    KVLayout,
    Limits,
    MemoryInfo,
    open_backend,
)
from dougong.hal.batch import GroupView
from dougong.models import CausalLM, StepContext
from dougong.plugins import ABI, BackendSpec, hookimpl, load_plugins


class HostDevice(Device):
    """The smallest device there can be: torch's CPU and the reference ops."""

    type = "cpu"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def setup(self) -> None:
        return None

    def memory(self) -> MemoryInfo:
        return MemoryInfo(1 << 30, 1 << 30)


class HostPlugin:
    @hookimpl
    def dougong_backends(self) -> list[BackendSpec]:
        return [BackendSpec(name="testhost", abi=ABI, target="dougong_models_testhost:HostDevice")]


def host_backend() -> Backend:
    """A backend of torch's CPU with reference ops only."""
    module = types.ModuleType("dougong_models_testhost")
    module.HostDevice = HostDevice  # type: ignore[attr-defined]
    sys.modules["dougong_models_testhost"] = module
    return open_backend("testhost", plugins=load_plugins("", entries=(), extra=[("testhost", HostPlugin())]))


class PagedModel:
    """A model, its groups, its caches and one block table per sequence and group.

    Sequences own ``blocks`` blocks each, in an order that is not the natural one; caches start as NaN.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        *,
        sequences: int = 1,
        max_len: int = 64,
        block_size: int = 4,
        layout: KVLayout = NHD,
        collectives: Collectives | None = None,
    ) -> None:
        self.model, self.block_size = model, block_size
        width = -(-max_len // block_size)
        specs = list(dict.fromkeys(attention.spec for attention in model.attentions))
        self.groups = []
        for index, spec in enumerate(specs):
            layers = tuple(a.layer_index for a in model.attentions if a.spec == spec)
            self.groups.append(
                KVGroup(index=index, layers=layers, spec=spec, layout=layout, manager_block=block_size,
                        kernel_block=block_size)
            )  # fmt: skip
        caches: list[Any] = [None] * len(model.attentions)
        for group in self.groups:
            for layer in group.layers:
                cache = backend.device.empty_cache(group, 1 + sequences * width)
                for plane in cache.planes.values():
                    plane.fill_(float("nan"))
                caches[layer] = cache
                model.attentions[layer].bind(group.index)
        limits = Limits(max_rows=sequences, max_tokens=sequences * max_len, max_kv_len=max_len, max_blocks=width)
        kernels = []
        for group in self.groups:
            query = AttentionQuery(spec=group.spec, layout=layout, block_size=block_size)
            kernels.append(backend.choose_attention(query).target(group.spec, group, limits, backend.device))
        self.ctx = StepContext(
            backend.op_table(model.dtype, layout), kernels, [k.new_plan() for k in kernels], caches, collectives
        )
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(sequences * width, generator=generator) + 1
        self.table = order.view(sequences, width).to(torch.int32)
        self.lengths = [0] * sequences

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Run new tokens; rows are (sequence, token ids), decode rows first. Logits [tokens, V] per row."""
        starts = [self.lengths[sequence] for sequence, _ in rows]
        q_lens = [len(tokens) for _, tokens in rows]
        kv_lens = [start + count for start, count in zip(starts, q_lens)]
        table = self.table[[sequence for sequence, _ in rows]]
        base = BatchView.build(q_lens, kv_lens, table, self.block_size, "cpu")
        group: GroupView = base.groups[0]
        base.groups = (group,) * len(self.groups)
        self.ctx.set_batch(base)
        for kernel, plan in zip(self.ctx.kernels, self.ctx.plans):
            kernel.plan(base, plan)
        ids = torch.tensor([token for _, tokens in rows for token in tokens])
        positions = torch.tensor([p for start, count in zip(starts, q_lens) for p in range(start, start + count)])
        logits = self.model.logits(self.model(ids, positions, self.ctx))
        for (sequence, _), length in zip(rows, kv_lens):
            self.lengths[sequence] = length
        return list(logits.split(q_lens))

    def run(self, tokens: Sequence[int], chunks: Sequence[int], sequence: int = 0) -> torch.Tensor:
        """Logits [T, V] of one sequence fed in chunks of the given sizes (the last one repeated)."""
        out, at, index = [], 0, 0
        while at < len(tokens):
            size = chunks[min(index, len(chunks) - 1)]
            out += self.step([(sequence, tokens[at : at + size])])
            at, index = at + size, index + 1
        return torch.cat(out)
