"""The Triton kernels behind the hal's interface, against the hal's reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dougong.hal import (
    HND,
    NHD,
    NZ16,
    X_PACKED,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Device,
    KVGroup,
    KVLayout,
    LayerArgs,
    Limits,
    LinearQuery,
    RaggedKV,
    allocate_cache,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong.plugins import resolve_target
from dougong_kernels.attention import BatchInvariantTritonAttention, TritonAttention
from dougong_kernels.ops.gemv import TritonLinear
from dougong_kernels.specs import kernel_specs

F16 = torch.float16


class Here(Device):
    type = "cpu"

    def __init__(self) -> None:
        self.index = 0
        self.torch_device = torch.device("cpu")


def build(kernel: type, spec: AttentionSpec, layout: KVLayout, block: int) -> Any:
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=block, kernel_block=block)
    return kernel(spec, group, Limits(max_rows=4, max_tokens=64, max_kv_len=128, max_blocks=16), Here())


@pytest.mark.parametrize(
    ("more", "layout", "kernel"),
    [
        ({}, HND, TritonAttention),
        (dict(window=9, softcap=4.0, sinks=True, alibi=True, lse=True), NHD, TritonAttention),
        (dict(kv_dtype=torch.int8, head_dim_v=16), HND, BatchInvariantTritonAttention),
        (dict(kv_dtype=torch.float8_e4m3fn), NHD, TritonAttention),
        (dict(kv_dtype=torch.float8_e4m3fnuz), NHD, TritonAttention),
        (dict(head_dim_v=48, window=9), X_PACKED, TritonAttention),
        (dict(kv_dtype=torch.float8_e4m3fnuz), X_PACKED, TritonAttention),
        ({}, NZ16, TritonAttention),
    ],
    ids=["plain", "features", "int8", "fp8", "fp8 fnuz", "packed", "packed fp8 fnuz", "tiled"],
)
def test_agrees_with_the_reference(more: dict[str, Any], layout: KVLayout, kernel: type) -> None:
    if kernel is BatchInvariantTritonAttention and more:
        more = {**more, "causal": False}
    torch.manual_seed(1)
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype=F16, **more)
    cache = allocate_cache(spec, layout, 12, 16, "cpu")
    for plane in cache.planes.values():
        plane.view(torch.uint8).fill_(0x80 if spec.kv_dtype == torch.float8_e4m3fnuz else 0x7F)
    kv_lens, q_lens = [33, 20, 12], [1, 3, 12]
    table = torch.tensor([[1, 2, 3], [4, 5, 10**8], [6, 10**8, 10**8]], dtype=torch.int32)
    history = BatchView.build(kv_lens, kv_lens, table.clamp(max=11), 16, "cpu")
    layer = LayerArgs(torch.tensor([0.02]), 0.03, torch.randn(4), torch.rand(4))
    subject, reference = build(kernel, spec, layout, 16), build(ReferenceAttention, spec, layout, 16)
    k = torch.randn(history.num_tokens, 2, 32).to(F16)
    v = torch.randn(history.num_tokens, 2, spec.head_dim_v).to(F16)
    subject.write(layer, k, v, cache, history.groups[0].slots)
    batch = BatchView.build(q_lens, kv_lens, table.clamp(max=11), 16, "cpu", slots=history.groups[0].slots[:16])
    batch.groups[0].block_table = table
    q = torch.randn(16, 8, 32).to(F16)[:, :4]
    answers = []
    for one in (subject, reference):
        plan = one.new_plan()
        one.plan(batch, plan)
        out = torch.full((16, 4, spec.head_dim_v), torch.nan, dtype=F16)
        lse = torch.full((16, 4), torch.nan) if spec.lse else None
        one.run(plan, layer, q, cache, out=out, lse=lse)
        answers.append((out, lse))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=2e-3, atol=2e-3)
    if spec.lse:
        torch.testing.assert_close(answers[0][1], answers[1][1], rtol=1e-5, atol=1e-5)


def test_ragged_keys_and_values() -> None:
    torch.manual_seed(2)
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype=F16, causal=False)
    lens = [20, 1, 5]
    batch = BatchView.build(lens, lens, torch.zeros(3, 2, dtype=torch.int32), 16, "cpu")
    kv = RaggedKV(torch.randn(26, 2, 32).to(F16), torch.randn(26, 2, 32).to(F16), batch.cu_q, batch.host_cu_q)
    q = torch.randn(26, 4, 32).to(F16)
    answers = []
    for kernel in (TritonAttention, ReferenceAttention):
        one = build(kernel, spec, NHD, 16)
        plan = one.new_plan()
        one.plan(batch, plan)
        answers.append(torch.full((26, 4, 32), torch.nan, dtype=F16))
        one.run(plan, LayerArgs(), q, kv, out=answers[-1])
    torch.testing.assert_close(*answers, rtol=2e-3, atol=2e-3)


def test_latent_cache_in_one_plane() -> None:
    torch.manual_seed(3)
    layout = KVLayout("latent", {"k": "b n h d"})
    spec = AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=48, head_dim_v=32, dtype=F16, latent=True)
    cache = allocate_cache(spec, layout, 4, 16, "cpu")
    cache.planes["k"].fill_(torch.nan)
    batch = BatchView.build(
        [1, 7], [20, 7], torch.tensor([[1, 2], [3, 99]], dtype=torch.int32), 16, "cpu", slots=torch.arange(8)
    )
    whole = BatchView.build([20, 7], [20, 7], torch.tensor([[1, 2], [3, 0]]), 16, "cpu")
    latent = torch.randn(27, 1, 48).to(F16)
    answers = []
    q = torch.randn(8, 4, 48).to(F16)
    for kernel in (TritonAttention, ReferenceAttention):
        one = build(kernel, spec, layout, 16)
        one.write(LayerArgs(), latent, latent[..., :32], cache, whole.groups[0].slots)
        plan = one.new_plan()
        one.plan(batch, plan)
        answers.append(torch.full((8, 4, 32), torch.nan, dtype=F16))
        one.run(plan, LayerArgs(), q, cache, out=answers[-1])
    torch.testing.assert_close(*answers, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("more", "query", "words"),
    [
        (dict(kv_dtype=torch.float8_e5m2), {}, "kv dtype"),
        (dict(head_dim=320), {}, "head dim"),
        (dict(dtype=torch.float64), {}, "dtype"),
        (dict(scale=-1.0), {}, "scale"),
        (dict(num_kv_heads=1, head_dim=100, head_dim_v=64, latent=True), {}, "rope part"),
        ({}, dict(layout=KVLayout("odd", {"k": "b d n h", "v": "b d n h"})), "lies as 'b d n h'"),
        ({}, dict(layout=KVLayout("tokens", {"k": "b n/4 h d 4", "v": "b n h d"})), "plane k lies as"),
        ({}, dict(batch_invariant=True), "batch invariance"),
    ],
)
def test_refusals_say_what_and_what_instead(more: dict[str, Any], query: dict[str, Any], words: str) -> None:
    spec = AttentionSpec(**{**dict(num_heads=4, num_kv_heads=2, head_dim=32, dtype=F16), **more})
    refusals = TritonAttention.supports(
        AttentionQuery(**{**dict(spec=spec, layout=NHD, block_size=16), **query}), Here()
    )
    assert any(words in str(refusal) for refusal in refusals), refusals


def test_supported_queries_are_not_refused() -> None:
    spec = AttentionSpec(num_heads=7, num_kv_heads=1, head_dim=80, head_dim_v=40, dtype=F16, kv_dtype=torch.int8)
    assert TritonAttention.supports(AttentionQuery(spec=spec, layout=HND, block_size=544), Here()) == ()
    invariant = AttentionQuery(spec=spec, layout=HND, block_size=16, batch_invariant=True)
    assert BatchInvariantTritonAttention.supports(invariant, Here()) == ()


def test_every_spec_names_something_that_exists() -> None:
    specs = kernel_specs(Here())
    assert {spec.op for spec in specs} >= {"attention", "qk_norm_rope_write", "add_rms_norm", "silu_mul", "sample"}
    for spec in specs:
        assert not spec.unavailable
        assert callable(resolve_target(spec.target))


def test_linear_kernel() -> None:
    torch.manual_seed(4)
    query = LinearQuery(in_features=48, out_features=20, dtype=F16)
    assert TritonLinear.supports(query, Here()) == ()
    assert TritonLinear.supports(LinearQuery(in_features=48, out_features=20, dtype=F16, format="int4"), Here())
    linear = TritonLinear(query, Here())
    packed = linear.prepare(torch.randn(20, 48))
    for rows in (1, 3, 40):
        x = torch.randn(rows, 48).to(F16)
        want = (x.double() @ packed.double().T).to(F16)
        torch.testing.assert_close(linear.apply(x, packed), want, rtol=2e-3, atol=4e-3)
