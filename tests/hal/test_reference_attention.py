"""The reference attention against loops written from the contract's text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dougong.hal import (
    HND,
    NHD,
    NZ16,
    X_PACKED,
    AttentionSpec,
    BatchView,
    KVGroup,
    KVLayout,
    LayerArgs,
    Limits,
    RaggedKV,
    allocate_cache,
)
from dougong.hal.reference.attention import ReferenceAttention

LIMITS = Limits(max_rows=16, max_tokens=256, max_kv_len=128, max_blocks=8)
ROWS = [(1, 3), (1, 17), (5, 5), (0, 9), (7, 33), (4, 2)]  # (queries, keys); the last has more queries than keys


def loops(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row in float64, one score at a time."""
    out = torch.zeros(q.shape[0], spec.num_heads, spec.head_dim_v, dtype=torch.float64)
    lse = torch.full((q.shape[0], spec.num_heads), -math.inf, dtype=torch.float64)
    for j in range(q.shape[0]):
        position = k.shape[0] - q.shape[0] + j
        for h in range(spec.num_heads):
            scores = []
            for p in range(k.shape[0]):
                if spec.causal and p > position:
                    continue
                if spec.window is not None and abs(p - position) >= spec.window:
                    continue
                s = float(q[j, h].double() @ k[p, h // spec.group_size].double()) * spec.scale
                if spec.softcap is not None:
                    s = spec.softcap * math.tanh(s / spec.softcap)
                if spec.alibi:
                    assert layer.slopes is not None
                    s += float(layer.slopes[h]) * (p - position)
                scores.append((s, p))
            if not scores:
                continue
            lse[j, h] = math.log(sum(math.exp(s) for s, _ in scores))
            total = sum(math.exp(s) for s, _ in scores)
            if spec.sinks:
                assert layer.sinks is not None
                total += math.exp(float(layer.sinks[h]))
            for s, p in scores:
                out[j, h] += math.exp(s) / total * v[p, h // spec.group_size].double()
    return out, lse


FEATURES: list[dict[str, Any]] = [
    {},
    {"window": 4},
    {"softcap": 2.0},
    {"alibi": True},
    {"sinks": True},
    {"causal": False},
    {"causal": False, "window": 3},
    {"head_dim_v": 16},
    {"window": 5, "sinks": True, "softcap": 3.0, "alibi": True},
]


@pytest.mark.parametrize("layout", [NHD, HND, NZ16, X_PACKED], ids=lambda layout: layout.name)
@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "+".join(features) or "plain")
def test_reference_agrees_with_the_contract(layout: KVLayout, features: dict[str, Any], device: Any) -> None:
    torch.manual_seed(1)
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, dtype=torch.float32, lse=True, **features)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=16, kernel_block=16)
    cache = allocate_cache(spec, layout, 20, 16, "cpu")
    for plane in cache.planes.values():
        plane.fill_(math.nan)
    table = (torch.randperm(19) + 1)[: 3 * len(ROWS)].reshape(len(ROWS), 3).to(torch.int32)
    keys = [torch.randn(n, 2, 32) for _, n in ROWS]
    values = [torch.randn(n, 2, spec.head_dim_v) for _, n in ROWS]
    for row, (_, n) in enumerate(ROWS):
        slots = torch.tensor([int(table[row, p // 16]) * 16 + p % 16 for p in range(n)])
        cache.write(slots, keys[row], values[row])
        table[row, (n + 15) // 16 :] = 2**30  # garbage that must not become an address
    batch = BatchView.build([n for n, _ in ROWS], [n for _, n in ROWS], table, 16, "cpu", slots=torch.zeros(0))
    kernel = ReferenceAttention(spec, group, LIMITS, device)
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    layer = LayerArgs(sinks=torch.randn(6) if spec.sinks else None, slopes=torch.rand(6) if spec.alibi else None)
    q = torch.randn(batch.num_tokens, 6, 32)
    out = torch.full((batch.num_tokens, 6, spec.head_dim_v), math.nan)
    lse = torch.full((batch.num_tokens, 6), math.nan)
    kernel.run(plan, layer, q, cache, out=out, lse=lse)
    at = 0
    for row, (queries, _) in enumerate(ROWS):
        want, want_lse = loops(spec, q[at : at + queries], keys[row], values[row], layer)
        assert torch.allclose(out[at : at + queries].double(), want, atol=2e-6)
        assert torch.allclose(lse[at : at + queries].double(), want_lse, atol=2e-6)
        at += queries
    assert not out.isnan().any()


def test_ragged_keys_need_no_cache(device: Any) -> None:
    torch.manual_seed(2)
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, causal=False)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=NHD, manager_block=16, kernel_block=16)
    lengths = [3, 1, 6]
    batch = BatchView.build(lengths, lengths, torch.zeros(3, 1), 16, "cpu", slots=torch.zeros(0))
    k, v, q = torch.randn(10, 2, 16), torch.randn(10, 2, 16), torch.randn(10, 4, 16)
    kernel = ReferenceAttention(spec, group, LIMITS, device)
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    out = torch.full_like(q, math.nan)
    kernel.run(plan, LayerArgs(), q, RaggedKV(k, v, batch.cu_q, batch.host_cu_q), out=out)
    at = 0
    for length in lengths:
        want, _ = loops(spec, q[at : at + length], k[at : at + length], v[at : at + length], LayerArgs())
        assert torch.allclose(out[at : at + length].double(), want, atol=2e-6)
        at += length


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_multiply_on_read_and_divide_on_write(dtype: torch.dtype, device: Any) -> None:
    torch.manual_seed(3)
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, kv_dtype=dtype)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=NHD, manager_block=8, kernel_block=8)
    cache = allocate_cache(spec, NHD, 3, 8, "cpu")
    layer = LayerArgs(k_scale=0.02, v_scale=torch.tensor(0.05))
    batch = BatchView.build([9], [9], torch.tensor([[2, 1]]), 8, "cpu")
    k, v, q = torch.randn(9, 1, 16), torch.randn(9, 1, 16), torch.randn(9, 2, 16)
    kernel = ReferenceAttention(spec, group, LIMITS, device)
    kernel.write(layer, k, v, cache, batch.groups[0].slots)
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    out = torch.empty_like(q)
    kernel.run(plan, layer, q, cache, out=out)
    stored_k, stored_v = cache.read(batch.groups[0].slots)
    want, _ = loops(spec, q, stored_k.float() * 0.02, stored_v.float() * 0.05, layer)
    assert torch.allclose(out.double(), want, atol=1e-5)
    assert (stored_v.float() * 0.05 - v).abs().max() < 0.2
