"""Captured decodes: stale without an update, fresh with one, and bounded in number."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from dougong.errors import EngineError
from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionSpec,
    Backend,
    BatchView,
    Graph,
    KVGroup,
    KVLayout,
    LayerArgs,
    Limits,
    Plan,
    allocate_cache,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong_ascend.attention import FusedAttention
from dougong_ascend.latent import LatentAttention, TiledLatentAttention
from dougong_ascend.layouts import HND_PAGED, LATENT, LATENT_NZ, NHD_PAGED
from dougong_ascend.plans import FusedPlan
from dougong_ascend.sdk import FusedCall
from dougong_ascend.twin import TwinRefusal
from dougong_ascend.twin.settings import settings

BLOCK, WIDTH, ROWS = 16, 3, 3
LIMITS = Limits(max_rows=ROWS, max_tokens=8, max_kv_len=BLOCK * WIDTH, max_blocks=WIDTH)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32)
MLA = AttentionSpec(num_heads=32, num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True)


class Decode:
    """Two layers over one cache, with every tensor at a fixed address; lengths and tables change between replays."""

    def __init__(self, backend: Backend, kind: type[AttentionKernel], spec: AttentionSpec, layout: KVLayout) -> None:
        self.block = size = layout.block_sizes.nearest(BLOCK)
        group = KVGroup(index=0, layers=(0, 1), spec=spec, layout=layout, manager_block=size, kernel_block=size)
        self.backend, self.spec = backend, spec
        self.kernel = kind(spec, group, replace(LIMITS, max_kv_len=size * WIDTH), backend.device)
        self.cache = backend.device.empty_cache(group, ROWS * WIDTH + 1)
        generator = torch.Generator().manual_seed(3)
        for plane in self.cache.planes.values():
            plane.copy_(torch.randn(plane.shape, generator=generator).to(plane.dtype))
        self.q = torch.randn(ROWS, spec.num_heads, spec.head_dim, generator=generator).to(spec.dtype).to("npu")
        self.out = torch.zeros(ROWS, spec.num_heads, spec.head_dim_v, dtype=spec.dtype, device="npu")
        sinks = torch.randn(spec.num_heads, generator=generator).to("npu") if spec.sinks else None
        self.layer = LayerArgs(sinks=sinks)
        self.plan: Plan = self.kernel.new_plan()

    def step(self) -> None:
        middle = torch.empty_like(self.out)
        self.kernel.run(self.plan, self.layer, self.q, self.cache, out=middle)
        self.kernel.run(self.plan, self.layer, self.q * 0.5, self.cache, out=self.out)
        self.out.add_(middle)

    def prepare(self, kv_lens: list[int], shift: int) -> None:
        table = (torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) + shift) % (ROWS * WIDTH) + 1
        self.kernel.plan(BatchView.build([1] * ROWS, kv_lens, table, self.block, "npu"), self.plan)

    def fresh(self, kv_lens: list[int], shift: int) -> torch.Tensor:
        """The answer of a plain call."""
        self.prepare(kv_lens, shift)
        self.step()
        return self.out.cpu().clone()

    def capture(self, kv_lens: list[int], shift: int) -> Graph:
        graphs = self.backend.device.graphs
        assert graphs is not None
        self.prepare(kv_lens, shift)
        self.step()
        graph = graphs.new(graphs.new_pool())
        with graph.capture():
            self.step()
        return graph


CASES = [
    (FusedAttention, SPEC, NHD_PAGED), (FusedAttention, SPEC, HND_PAGED), (LatentAttention, MLA, LATENT),
    (FusedAttention, replace(SPEC, window=20, sinks=True), NHD_PAGED),
    (TiledLatentAttention, MLA, LATENT_NZ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spec", "layout"), CASES, ids=["nhd", "hnd", "latent", "window", "tiles"])
def test_replays_follow_their_updates(
    backend: Backend, kind: type[AttentionKernel], spec: AttentionSpec, layout: KVLayout
) -> None:
    decode = Decode(backend, kind, spec, layout)
    steps = [([5, 40, 17], 0), ([6, 41, 18], 0), ([48, 1, 33], 4), ([7, 0, 1], 2), ([8, 2, 30], 2)]
    expected = [decode.fresh(*step) for step in steps]
    graph = decode.capture([1, 1, 1], 0)
    for step, right in zip(steps, expected):
        decode.prepare(*step)
        decode.kernel.update_graph(graph, decode.plan)
        decode.out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(decode.out.cpu(), right)
    assert not expected[3].isnan().any()


def test_a_replay_without_an_update_waits_for_ever(backend: Backend) -> None:
    decode = Decode(backend, FusedAttention, SPEC, NHD_PAGED)
    graph = decode.capture([1, 1, 1], 0)
    with pytest.raises(TwinRefusal, match="2 of 2 task groups were not updated"):
        graph.replay()
    decode.kernel.update_graph(graph, decode.plan)
    graph.replay()
    with pytest.raises(TwinRefusal, match="wait for ever"):  # each replay wants its own
        graph.replay()


def test_without_that_wait_it_would_be_stale(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decode(backend, FusedAttention, SPEC, NHD_PAGED)
    old, new = decode.fresh([5, 6, 7], 0), decode.fresh([20, 30, 40], 0)
    assert not torch.equal(old, new)
    graph = decode.capture([5, 6, 7], 0)
    monkeypatch.setattr(settings, "waits", False)
    decode.prepare([20, 30, 40], 0)
    graph.replay()
    assert torch.equal(decode.out.cpu(), old)
    decode.kernel.update_graph(graph, decode.plan)
    graph.replay()
    assert torch.equal(decode.out.cpu(), new)


def test_a_graph_of_other_rows_is_refused(backend: Backend) -> None:
    decode = Decode(backend, FusedAttention, SPEC, NHD_PAGED)
    graphs = backend.device.graphs
    assert graphs is not None
    table = torch.arange(1, 7).reshape(2, 3)
    batch = BatchView.build([1, 2], [4, 9], table, BLOCK, "npu")
    decode.kernel.plan(batch, decode.plan)
    with pytest.raises(EngineError, match="decodes only"), graphs.new().capture():
        decode.step()


def test_a_capture_keeps_no_workspace(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool gives a layer's workspace to the next: a capture holds one layer's worth, not every layer's."""
    taken: list[weakref.ref[torch.Tensor]] = []
    reserve = FusedCall.reserve

    def watched(call: FusedCall) -> None:
        reserve(call)
        assert call.workspace is not None
        taken.append(weakref.ref(call.workspace))

    monkeypatch.setattr(FusedCall, "reserve", watched)
    graph = Decode(backend, FusedAttention, SPEC, NHD_PAGED).capture([5, 6, 7], 0)
    assert [found() for found in taken] == [None, None] and graph.state


def test_a_graph_of_another_size_is_not_updated(backend: Backend) -> None:
    decode = Decode(backend, FusedAttention, SPEC, NHD_PAGED)
    graph = decode.capture([1, 1, 1], 0)
    for q_lens, found in (([1, 1], "2 rows of 1 queries"), ([2, 2, 2], "1 rows of 2 queries"), ([0], "nothing")):
        batch = BatchView.build(q_lens, [9] * len(q_lens), torch.arange(9).reshape(3, 3)[: len(q_lens)], BLOCK, "npu")
        plan = decode.kernel.new_plan()
        decode.kernel.plan(batch, plan)
        with pytest.raises(EngineError, match=f"a graph of 3 decodes was planned {found}"):
            decode.kernel.update_graph(graph, plan)


def test_a_longer_batch_leaves_no_marks(backend: Backend) -> None:
    decode = Decode(backend, FusedAttention, SPEC, NHD_PAGED)
    decode.prepare([5, 0, 0], 0)
    assert (
        isinstance(decode.plan, FusedPlan) and decode.plan.blind.flatten().tolist() == [False, True, True] + [False] * 5
    )
    decode.kernel.plan(BatchView.build([1], [5], torch.arange(3)[None], BLOCK, "npu"), decode.plan)
    assert not decode.plan.blind.any()


def test_captures_are_budgeted(backend: Backend) -> None:
    graphs = backend.device.graphs
    assert graphs is not None
    assert [graphs.budget(layers) for layers in (1, 30, 61, 10**6)] == [900, 58, 29, 1]


def test_the_eager_answer_is_the_reference(backend: Backend) -> None:
    decode = Decode(backend, FusedAttention, SPEC, NHD_PAGED)
    kv_lens = [5, 40, 17]
    got = decode.fresh(kv_lens, 0)
    host = allocate_cache(SPEC, NHD, ROWS * WIDTH + 1, BLOCK, "cpu")
    for name, plane in host.planes.items():
        plane.copy_(decode.cache.planes[name].cpu())
    group = replace(decode.kernel.group, layout=NHD)
    reference = ReferenceAttention(SPEC, group, LIMITS, backend.device)
    plan = reference.new_plan()
    reference.plan(BatchView.build([1] * ROWS, kv_lens, torch.arange(9).reshape(3, 3) + 1, BLOCK, "cpu"), plan)
    total = torch.zeros_like(got)
    for scale in (1.0, 0.5):
        out = torch.empty_like(got)
        reference.run(plan, LayerArgs(), decode.q.cpu() * scale, host, out=out)
        total += out
    torch.testing.assert_close(got, total, rtol=2**-6, atol=2**-6)
