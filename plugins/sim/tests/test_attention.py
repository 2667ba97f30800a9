"""The device's attention equals the reference, and a captured decode goes stale unless it is updated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dougong_sim
from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    Backend,
    BatchView,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    allocate_cache,
    open_backend,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong.plugins import load_plugins
from dougong_sim.attention import SimAttention
from dougong_sim.device import SimDevice

BLOCK, BLOCKS, WIDTH = 4, 16, 5
LIMITS = Limits(max_rows=4, max_tokens=32, max_kv_len=BLOCK * WIDTH, max_blocks=WIDTH)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
SPECS = {
    "plain": SPEC,
    "bf16": replace(SPEC, dtype=torch.bfloat16, kv_dtype=torch.bfloat16),
    "window": replace(SPEC, window=3),
    "softcap": replace(SPEC, softcap=2.0),
    "alibi_sinks": replace(SPEC, alibi=True, sinks=True),
    "noncausal_lse": replace(SPEC, causal=False, lse=True),
    "narrow_v": replace(SPEC, head_dim_v=4),
}


@pytest.fixture(scope="module")
def backend() -> Backend:
    return open_backend("sim", plugins=load_plugins(entries=(), extra=[("sim", dougong_sim)]))


def group_of(spec: AttentionSpec) -> KVGroup:
    return KVGroup(index=0, layers=(0,), spec=spec, layout=NHD, manager_block=BLOCK, kernel_block=BLOCK)


def filled_cache(spec: AttentionSpec, where: str) -> LayerCache:
    cache = allocate_cache(spec, NHD, BLOCKS, BLOCK, where)
    for name, plane in cache.planes.items():
        seed = torch.Generator().manual_seed(len(name))
        plane.copy_(torch.randn(plane.shape, generator=seed).to(plane.dtype))
    return cache


def table() -> torch.Tensor:
    return torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(1))[: 3 * WIDTH].view(3, WIDTH).int() + 1


def layer_of(spec: AttentionSpec, where: str) -> LayerArgs:
    heads = torch.linspace(0.1, 0.7, spec.num_heads, device=where)
    return LayerArgs(sinks=heads if spec.sinks else None, slopes=heads if spec.alibi else None)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("q_lens, kv_lens", [([1, 1, 1], [1, 9, 20]), ([1, 5, 0], [7, 5, 0]), ([4, 1, 3], [4, 6, 19])])
def test_equal_to_the_reference(backend: Backend, spec: AttentionSpec, q_lens: list[int], kv_lens: list[int]) -> None:
    choice = backend.choose_attention(AttentionQuery(spec=spec, layout=NHD, block_size=BLOCK))
    assert choice.target is SimAttention
    assert choice.spec.graph == "update"
    tokens = sum(q_lens)
    q = torch.randn(tokens, spec.num_heads, spec.head_dim, generator=torch.Generator().manual_seed(0)).to(spec.dtype)

    def attend(kind: type[AttentionKernel], where: str) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = kind(spec, group_of(spec), LIMITS, backend.device)
        plan = kernel.new_plan()
        kernel.plan(BatchView.build(q_lens, kv_lens, table(), BLOCK, where), plan)
        out = torch.full((tokens, spec.num_heads, spec.head_dim_v), torch.nan, dtype=spec.dtype, device=where)
        lse = torch.full((tokens, spec.num_heads), torch.nan, device=where)
        kernel.run(
            plan, layer_of(spec, where), q.to(where), filled_cache(spec, where), out=out, lse=lse if spec.lse else None
        )
        return out.cpu(), lse.cpu()

    for got, want in zip(attend(SimAttention, "sim"), attend(ReferenceAttention, "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_what_it_lacks_goes_to_the_reference(backend: Backend) -> None:
    spec = replace(SPEC, kv_dtype=torch.int8)
    choice = backend.choose_attention(AttentionQuery(spec=spec, layout=NHD, block_size=BLOCK))
    assert choice.target is ReferenceAttention
    assert "kv_int8" in str(choice.refused)


class Decode:
    """Two layers of a decode step with buffers at fixed addresses, as an engine's graph has them."""

    def __init__(self, device: SimDevice) -> None:
        self.group = group_of(SPEC)
        self.kernel = SimAttention(SPEC, self.group, LIMITS, device)
        self.plan = self.kernel.new_plan()
        self.caches = [filled_cache(SPEC, "sim"), filled_cache(replace(SPEC, causal=False), "sim")]
        self.table = table().to("sim")
        self.q = torch.zeros(3, SPEC.num_heads, SPEC.head_dim, device="sim")
        self.result = torch.zeros_like(self.q)
        self.device = device

    def batch(self, kv_lens: list[int]) -> BatchView:
        """The step's metadata; the block table stays in its buffer."""
        view = BatchView.build([1, 1, 1], kv_lens, table(), BLOCK, "sim")
        return replace(view, groups=(replace(view.groups[0], block_table=self.table),))

    def step(self) -> None:
        x = self.q
        for cache in self.caches:
            out = torch.empty_like(x)
            self.kernel.run(self.plan, LayerArgs(), x * 1.5, cache, out=out)
            x = x + out
        self.result.copy_(x)

    def fresh(self, kv_lens: list[int]) -> torch.Tensor:
        self.kernel.plan(self.batch(kv_lens), self.plan)
        self.step()
        return self.result.cpu()


def test_a_captured_decode_is_stale_without_update_graph(device: SimDevice) -> None:
    decode = Decode(device)
    old, new = [3, 8, 17], [4, 9, 18]
    query = torch.randn(3, SPEC.num_heads, SPEC.head_dim)

    decode.kernel.plan(decode.batch(old), decode.plan)
    graph = device.graphs.new()
    with graph.capture():
        decode.step()
    assert len(graph.state[decode.kernel]) == len(decode.caches)

    decode.q.copy_(query)
    want_old, want_new = decode.fresh(old), decode.fresh(new)
    assert not torch.equal(want_old, want_new)

    decode.kernel.plan(decode.batch(new), decode.plan)  # the plan is of the new step, the graph is not
    graph.replay()
    assert torch.equal(decode.result.cpu(), want_old), "stale: the lengths of the capture"

    decode.kernel.update_graph(graph, decode.plan)
    graph.replay()
    assert torch.equal(decode.result.cpu(), want_new)

    # New tables and queries need no update: they are read from their buffers.
    moved = torch.randperm(BLOCKS - 1)[: 3 * WIDTH].view(3, WIDTH).int() + 1
    decode.table.copy_(moved)
    decode.q.mul_(-1)
    graph.replay()
    got = decode.result.cpu()
    assert torch.equal(got, decode.fresh(new))
    assert not torch.equal(got, want_new)


def test_the_reference_itself_cannot_be_captured(device: SimDevice) -> None:
    decode = Decode(device)
    decode.kernel = ReferenceAttention(SPEC, decode.group, LIMITS, device)  # type: ignore[assignment]
    decode.plan = decode.kernel.new_plan()
    decode.kernel.plan(decode.batch([1, 2, 3]), decode.plan)
    with pytest.raises(RuntimeError, match="while a graph is being captured"), device.graphs.new().capture():
        decode.step()
