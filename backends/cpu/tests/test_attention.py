"""The C++ attention against a float64 reference, at the boundaries of the contract."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import pytest
import torch
from oracle import Case, assert_close, kernel_for, run

from dougong.hal import AttentionSpec, BatchView, LayerArgs, LayerCache, RaggedKV
from dougong.hal.layout import NHD


def spec(heads: int = 6, kv_heads: int = 2, dim: int = 64, **more: Any) -> AttentionSpec:
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, **{"dtype": torch.float32, **more})


NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.12 on; 0x4000 is Linux's value

MIXED = [(1, 17), (1, 1), (0, 9), (5, 33), (40, 40), (3, 64), (0, 0), (1, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_mixed_batch(isa: str, dtype: torch.dtype, layout: str) -> None:
    case = Case(spec(dtype=dtype, lse=True), MIXED, layout=layout)
    assert_close(case, *run(case, lse=True))


@pytest.mark.parametrize("group", [1, 3, 5, 6, 7, 8, 12, 70])
def test_any_head_ratio(isa: str, group: int) -> None:
    case = Case(spec(heads=2 * group, kv_heads=2, dim=32), [(1, 31), (9, 20), (1, 5)], seed=group)
    assert_close(case, *run(case))


@pytest.mark.parametrize("dim", [8, 32, 40, 64, 72, 80, 96, 112, 128, 192, 256])
def test_any_head_dim(isa: str, dim: int) -> None:
    case = Case(spec(heads=3, kv_heads=1, dim=dim, dtype=torch.float32), [(1, 37), (30, 37)], seed=dim)
    assert_close(case, *run(case))


@pytest.mark.parametrize("block", [1, 7, 8, 16, 32, 64, 128, 544])
def test_lengths_around_block_edges(isa: str, block: int) -> None:
    lengths = sorted({max(1, block * k + d) for k in (1, 2) for d in (-1, 0, 1)} | {63, 64, 65})
    case = Case(spec(dim=32), [(1, n) for n in lengths] + [(min(n, 5), n) for n in lengths[:3]], block=block)
    assert_close(case, *run(case))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_window(isa: str, window: int, causal: bool) -> None:
    case = Case(spec(window=window, causal=causal, dim=32), [(1, 100), (70, 100), (3, 16), (1, 1)], seed=window)
    assert_close(case, *run(case))


FEATURES: dict[str, dict[str, Any]] = {
    "noncausal": {"causal": False},
    "softcap": {"softcap": 30.0},
    "small softcap": {"softcap": 2.0, "scale": 0.3},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"softcap": 20.0, "alibi": True, "sinks": True, "window": 30},
    "dv": {"head_dim_v": 48},
    "wide dv": {"head_dim_v": 128},
    "int8": {"kv_dtype": torch.int8},
    "fp8": {"kv_dtype": torch.float8_e4m3fn},
    "fp8 under bf16": {"kv_dtype": torch.float8_e4m3fn, "dtype": torch.bfloat16, "sinks": True},
    "int8 alibi": {"kv_dtype": torch.int8, "alibi": True, "window": 20},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(isa: str, feature: str) -> None:
    case = Case(spec(**FEATURES[feature]), MIXED, seed=3)
    assert_close(case, *run(case, lse=True))


def test_latent(isa: str) -> None:
    case = Case(spec(heads=16, kv_heads=1, dim=576, head_dim_v=512, latent=True), [(1, 50), (6, 20)], block=64)
    assert_close(case, *run(case))


def test_queries_that_see_nothing(isa: str) -> None:
    case = Case(spec(sinks=True), [(5, 2), (4, 0), (1, 0), (1, 3)])
    out, lse = run(case, lse=True)
    assert_close(case, out, lse)
    assert bool((out[:3] == 0).all()) and bool((out[5:10] == 0).all())


@pytest.mark.parametrize("span", [64, 100, 128])
@pytest.mark.parametrize("threads", [1, 3])
def test_split_rows_merge(isa: str, span: int, threads: int) -> None:
    case = Case(spec(sinks=True, lse=True), [(1, 700), (2, 300), (1, 64), (1, 65)])
    kernel = kernel_for(case)
    cache, batch = case.paged()
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    plan.step.span, plan.step.threads = span, threads
    out = torch.full_like(case.q, math.nan)
    lse = torch.empty(case.q.shape[:2])
    kernel.run(plan, case.layer, case.q, cache, out=out, lse=lse)
    assert_close(case, out, lse)


def test_long_row(isa: str) -> None:
    case = Case(spec(heads=2, kv_heads=1), [(1, 9000), (3, 5000)])
    assert_close(case, *run(case))


def test_large_scores(isa: str) -> None:
    case = Case(spec(scale=4.0, sinks=True), [(1, 200), (50, 60)])
    out, lse = run(case, lse=True)
    assert_close(case, out, lse)


@pytest.mark.parametrize("sink", [-1e4, -100.0, 100.0, 1e4, math.inf, -math.inf])
def test_extreme_sinks(isa: str, sink: float) -> None:
    case = Case(spec(sinks=True), [(1, 20)])
    case.layer = LayerArgs(sinks=torch.full((6,), sink))
    out, _ = run(case)
    if sink >= 100.0:
        assert float(out.abs().max()) < 1e-30
    else:
        case.layer = LayerArgs(sinks=torch.full((6,), max(sink, -1e4)))
        assert_close(case, out, None)


def test_same_bits_whatever_the_batch_and_the_threads(isa: str) -> None:
    rows = [(1, 3000), (1, 65), (9, 70), (1, 129)]
    case = Case(spec(), rows)
    whole, _ = run(case)
    at = 0
    for index, (q_len, n) in enumerate(rows):
        alone = Case(spec(), [(q_len, n)])
        alone.q, alone.keys, alone.values = case.q[at : at + q_len], [case.keys[index]], [case.values[index]]
        got, _ = run(alone)
        assert torch.equal(got, whole[at : at + q_len])
        at += q_len
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        threaded, _ = run(case)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threaded, whole)


def test_scaling_the_query_by_two_and_the_scale_by_half_keeps_every_bit(isa: str) -> None:
    case = Case(spec(scale=0.25), MIXED)
    first, _ = run(case)
    other = Case(spec(scale=0.125), MIXED)
    other.q = case.q * 2
    assert torch.equal(first, run(other)[0])


def test_strided_query_output_and_cache(isa: str) -> None:
    case = Case(spec(), MIXED)
    want, _ = run(case)
    cache, batch = case.paged()
    wide = torch.full((*cache.k.shape[:1], 3, *cache.k.shape[1:]), math.nan)
    wide[:, 0], wide[:, 2] = cache.k, cache.v
    both = LayerCache({"k": wide[:, 0], "v": wide[:, 2]}, NHD, case.block, case.spec)
    tokens = case.q.shape[0]
    packed = torch.full((tokens, 10, 64), math.nan)
    packed[:, :6] = case.q
    out = torch.full((tokens, 64, 8), math.nan).transpose(1, 2)[:, :6]
    kernel = kernel_for(case)
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    kernel.run(plan, case.layer, packed[:, :6], both, out=out)
    assert torch.equal(out, want)
    scattered = [plane.transpose(1, 3).contiguous().transpose(1, 3) for plane in (cache.k, cache.v)]
    odd = LayerCache({"k": scattered[0], "v": scattered[1]}, NHD, case.block, case.spec)
    kernel.run(plan, case.layer, case.q, odd, out=out)
    assert_close(case, out, None)


def test_block_stride_beyond_two_to_the_31(isa: str) -> None:
    """Blocks lie 2^31 elements apart in memory that is reserved but never committed."""
    case = Case(spec(heads=2, kv_heads=1, dim=32), [(1, 40), (7, 20)])
    cache, batch = case.paged()
    blocks, stride = cache.k.shape[0], 2**31 + 64
    space = mmap.mmap(-1, (blocks * stride + 16 * 32) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    flat = torch.frombuffer(space, dtype=torch.float32)
    k = flat.as_strided(cache.k.shape, (stride, 32, 32, 1))
    v = flat.as_strided(cache.v.shape, (stride, 32, 32, 1), 16 * 32)
    k.copy_(cache.k)
    v.copy_(cache.v)
    far = LayerCache({"k": k, "v": v}, NHD, 16, case.spec)
    kernel = kernel_for(case)
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    out = torch.full_like(case.q, math.nan)
    kernel.run(plan, case.layer, case.q, far, out=out)
    assert_close(case, out, None)
    slot = (blocks - 1) * 16 + 3
    kernel.write(case.layer, torch.ones(1, 1, 32), torch.full((1, 1, 32), 2.0), far, torch.tensor([slot]))
    assert bool((k[-1, 3] == 1).all()) and bool((v[-1, 3] == 2).all())


def test_ragged(isa: str) -> None:
    for causal in (True, False):
        case = Case(spec(causal=causal, alibi=True), [(7, 7), (0, 3), (12, 40), (5, 0)])
        lengths = torch.tensor([0, *(n for _, n in case.rows)], dtype=torch.int32).cumsum(0).int()
        kv = RaggedKV(torch.cat(case.keys), torch.cat(case.values), lengths, lengths)
        batch = BatchView.build(
            [q for q, _ in case.rows], [n for _, n in case.rows], torch.zeros(4, 1), 16, "cpu",
            slots=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        kernel = kernel_for(case)
        plan = kernel.new_plan()
        kernel.plan(batch, plan)
        out = torch.full_like(case.q, math.nan)
        kernel.run(plan, case.layer, case.q, kv, out=out)
        assert_close(case, out, None)


@pytest.mark.parametrize(
    ("q", "out", "words"),
    [
        ((3, 6, 64), (3, 6, 48), r"out: torch.float32 \(3, 6, 48\); the spec says torch.float32 \(tokens, 6, 64\)"),
        ((3, 6, 32), (3, 6, 64), "queries: "),
        ((3, 5, 64), (3, 6, 64), "queries: "),
    ],
)
def test_tensors_unlike_the_spec_never_reach_the_native_code(q: Any, out: Any, words: str) -> None:
    case = Case(spec(), [(3, 7)])
    kernel = kernel_for(case)
    cache, batch = case.paged()
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    with pytest.raises(AssertionError, match=words):
        kernel.run(plan, case.layer, torch.zeros(q), cache, out=torch.zeros(out))
    with pytest.raises(AssertionError, match=r"out: torch\.bfloat16"):
        kernel.run(plan, case.layer, case.q, cache, out=torch.zeros_like(case.q, dtype=torch.bfloat16))


def test_an_empty_batch(isa: str) -> None:
    case = Case(spec(), [(0, 0)])
    out, _ = run(case)
    assert out.shape[0] == 0


def test_needle(isa: str) -> None:
    """The query is its target's code plus a louder key that must stay invisible; the answer is exact to the bit."""
    random = torch.Generator().manual_seed(5)
    case = Case(spec(heads=4, kv_heads=2, dim=64, scale=2.0), [(1, 50), (20, 50)])
    for row, (q_len, n) in enumerate(case.rows):
        codes = torch.where(torch.rand(n, 2, 64, generator=random) < 0.5, -1.0, 1.0)
        case.keys[row] = codes
        case.values[row] = (
            (torch.arange(n)[:, None, None] % 16 + torch.arange(2)[None, :, None] * 0.5).expand(n, 2, 64).clone()
        )
        for j in range(q_len):
            position = n - q_len + j
            target = position // 2
            at = j if row == 0 else 1 + j
            for h in range(4):
                case.q[at, h] = codes[target, h // 2] + (3 * codes[position + 1, h // 2] if position + 1 < n else 0)
    out, _ = run(case)
    at = 0
    for q_len, n in case.rows:
        for j in range(q_len):
            target = (n - q_len + j) // 2
            visible = n - q_len + j + 1
            if visible < n:  # a louder key exists just outside the mask; it also shifts visible scores, so no exactness
                assert torch.isfinite(out[at]).all()
            else:
                for h in range(4):
                    assert bool((out[at, h] == target % 16 + (h // 2) * 0.5).all())
            at += 1
    assert_close(case, out, None)


def test_struct_sizes_are_checked() -> None:
    from dougong_cpu._abi import STRUCTS
    from dougong_cpu.library import load

    assert [load()._lib.dg_sizeof(i) for i in range(len(STRUCTS))] == [ctypes.sizeof(s) for s in STRUCTS]
