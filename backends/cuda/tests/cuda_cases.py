"""What the tests of the attention providers share: a device, a group, a paged problem and its reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dougong.hal import AttentionSpec, BatchView, Device, KVGroup, KVLayout, LayerArgs, LayerCache, Limits, RaggedKV
from dougong.hal.cache import allocate_cache
from dougong.hal.reference.attention import ReferenceAttention

__all__ = ["BF16", "Here", "agree", "answer", "group_of", "paged", "spec"]

BF16 = torch.bfloat16


class Event:
    """A device's event on a host that has none."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Here(Device):
    """The host, with an H100's compute capability."""

    type = "cpu"
    is_nvidia = True
    num_processors = 2

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.index = 0
        self.torch_device = torch.device("cpu")
        self.properties = SimpleNamespace(major=capability[0], minor=capability[1])

    def new_event(self) -> Any:
        return Event()


def spec(**more: Any) -> AttentionSpec:
    return AttentionSpec(**{**dict(num_heads=4, num_kv_heads=2, head_dim=64, dtype=BF16), **more})


def group_of(spec: AttentionSpec, layout: KVLayout, block: int = 16) -> KVGroup:
    return KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=block, kernel_block=block)


LIMITS = Limits(max_rows=8, max_tokens=64, max_kv_len=128, max_blocks=8)


def paged(
    spec: AttentionSpec, layout: KVLayout, q_lens: list[int], kv_lens: list[int], block: int = 16
) -> tuple[BatchView, torch.Tensor, LayerCache]:
    """A batch, its queries (a slice of a packed tensor) and a cache whose unwritten slots are NaN."""
    blocks = sum(-(-n // block) for n in kv_lens) + 3
    cache = allocate_cache(spec, layout, blocks, block, "cpu")
    for plane in cache.planes.values():
        plane.fill_(torch.nan)
    width = max(-(-n // block) for n in kv_lens) + 1
    table = torch.full((len(kv_lens), width), 2**31 - 1, dtype=torch.int32)
    free = iter((torch.randperm(blocks - 1) + 1).tolist())
    for row, length in enumerate(kv_lens):
        for place in range(-(-length // block)):
            table[row, place] = next(free)
    whole = BatchView.build(kv_lens, kv_lens, table, block, "cpu")
    k, v = torch.randn(2, whole.num_tokens, spec.num_kv_heads, spec.head_dim).to(spec.dtype)
    cache.write(whole.groups[0].slots, k, v)
    batch = BatchView.build(q_lens, kv_lens, table, block, "cpu", slots=torch.arange(sum(q_lens)))
    q = torch.randn(batch.num_tokens, 2 * spec.num_heads, spec.head_dim).to(spec.dtype)[:, : spec.num_heads]
    return batch, q, cache


def answer(
    kernel: type, spec: AttentionSpec, group: KVGroup, batch: BatchView, q: torch.Tensor, kv: LayerCache | RaggedKV,
    device: Device | None = None, limits: Limits = LIMITS,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Plan and run into NaN."""
    one = kernel(spec, group, limits, device or Here())
    plan = one.new_plan()
    one.plan(batch, plan)
    out = torch.full((batch.num_tokens, spec.num_heads, spec.head_dim_v), torch.nan, dtype=spec.dtype)
    lse = torch.full((batch.num_tokens, spec.num_heads), torch.nan) if spec.lse else None
    one.run(plan, LayerArgs(), q, kv, out=out, lse=lse)
    return out, lse


def agree(kernel: type, spec: AttentionSpec, group: KVGroup, batch: BatchView, q: Any, kv: Any, **more: Any) -> None:
    """``kernel`` and the core's reference give the same."""
    got, got_lse = answer(kernel, spec, group, batch, q, kv, **more)
    want, want_lse = answer(ReferenceAttention, spec, group, batch, q, kv)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    if want_lse is not None:
        torch.testing.assert_close(got_lse, want_lse, rtol=1e-3, atol=1e-3)
