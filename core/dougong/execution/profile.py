"""The largest step an engine may run, on a cache of its own, to see what it allocates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dougong.execution.groups import GroupChoice
from dougong.hal import BatchView, Collectives, Device, GroupView, Limits, OpTable
from dougong.models import CausalLM, StepContext

__all__ = ["largest_step"]

#: Float32 copies of the logits that a step with every sampling option holds at once.
_LOGIT_COPIES = 6


def largest_step(
    model: CausalLM,
    chosen: Sequence[GroupChoice],
    ops: OpTable,
    device: Device,
    collectives: Collectives,
    *,
    rows: int,
    tokens: int,
    max_len: int,
) -> Callable[[], None]:
    """A function that runs a forward of ``tokens`` tokens and makes and handles the logits of ``rows`` rows.

    Its caches, one per group and shared by the group's layers, are made here and live as long as the function, so that
    they do not count as activations.
    """
    where = device.torch_device
    tokens = min(tokens, rows * max_len)  # what the scheduler may give: kernels' plans hold no more rows
    each = min(max_len, tokens)
    lengths = [each] * (tokens // each) + ([tokens % each] if tokens % each else [])
    caches, views = {}, []
    host_cu_q = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    host_cu_q[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    host_len = torch.tensor(lengths, dtype=torch.int32)
    kernels, plans = [], []
    for one in chosen:
        group = one.group
        size = group.kernel_block
        width = -(-each // size)
        blocks = width * len(lengths)
        cache = device.empty_cache(group, blocks)
        for plane in cache.planes.values():
            plane.zero_()
        caches.update(dict.fromkeys(group.layers, cache))
        table = torch.arange(blocks, dtype=torch.int32, device=where).reshape(len(lengths), width)
        slots = torch.cat([torch.arange(n, device=where) + row * width * size for row, n in enumerate(lengths)])
        views.append(GroupView(host_len.to(where), host_len, each, table, slots))
        limits = Limits(max_rows=rows + 1, max_tokens=tokens, max_kv_len=max_len, max_blocks=width)
        kernel = one.choice.target(group.spec, group, limits, device)
        kernels.append(kernel)
        plans.append(kernel.new_plan())
    context = StepContext(ops, kernels, plans, [caches[layer] for layer in sorted(caches)], collectives)
    batch = BatchView(len(lengths), tokens, 0, each, host_cu_q.to(where), host_cu_q, tuple(views))
    context.set_batch(batch)
    ids = torch.zeros(tokens, dtype=torch.int64, device=where)
    positions = torch.cat([torch.arange(n, device=where) for n in lengths])

    def run() -> None:
        for kernel, plan in zip(kernels, plans):
            kernel.plan(batch, plan)
        hidden = model(ids, positions, context)
        logits = model.logits(hidden[:rows]).float()
        copies = [torch.empty_like(logits) for _ in range(_LOGIT_COPIES)]
        del copies, logits, hidden

    return run
