"""The fused ops and the cache write against the torch reference, which defines them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dougong.hal import HND, NHD, AttentionSpec, KVGroup, LayerArgs, Limits, QKVShape, RopeTable
from dougong.hal.reference import ops as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: {"rtol": 3e-6, "atol": 3e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
         torch.float16: {"rtol": 2**-10, "atol": 1e-4}}  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, **CLOSE[want.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 576), (5, 100), (3, 7), (2, 3, 64), (0, 64)])
def test_rms_norm(isa: str, dtype: torch.dtype, offset: float, shape: tuple[int, ...]) -> None:
    from dougong_cpu import ops

    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
    agree(ops.rms_norm(x, weight, 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(isa: str, dtype: torch.dtype) -> None:
    from dougong_cpu import ops

    for x, residual in (
        (normal(4, 96, dtype=dtype), normal(4, 96, dtype=dtype, seed=1)),
        (normal(4, 200, dtype=dtype)[:, 3:99], normal(96, 4, dtype=dtype, seed=1).T),
    ):
        weight = normal(96, dtype=dtype, seed=2)
        want, total = reference.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
        got, kept = ops.add_rms_norm(x.clone(memory_format=torch.preserve_format), residual, weight, 1e-6)
        agree(got, want)
        assert torch.equal(kept, total)
    same = normal(2, 96, dtype=dtype)
    want, total = reference.add_rms_norm(same, same, weight, 1e-6)
    got, kept = ops.add_rms_norm(same, same, weight, 1e-6)
    agree(got, want)
    assert torch.equal(kept, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 64, 1000])
def test_argmax(isa: str, dtype: torch.dtype, width: int) -> None:
    """The lowest id among equals, whatever the width; a NaN wins, as in the reference."""
    from dougong_cpu import ops

    x = (normal(40, width + 3, dtype=dtype) * 2).round()[:, :width]  # rounded: many are equal
    x[0] = -math.inf
    x[1, width // 2] = math.inf
    x[2, -1] = x[2].amax()
    for row in (3, 4):
        x[row, width // 3 :: 7] = math.nan
    x[5] = math.nan
    want = []
    for row in x.tolist():
        nans = [i for i, v in enumerate(row) if v != v]
        want.append(nans[0] if nans else row.index(max(row)))
    assert ops.argmax(x).tolist() == want
    assert ops.argmax(x[:0]).tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["silu_mul", "gelu_tanh_mul"])
def test_gated(isa: str, dtype: torch.dtype, op: str) -> None:
    from dougong_cpu import ops

    for x in (
        normal(3, 192, dtype=dtype) * 4,
        normal(2, 2, 38, dtype=dtype),
        torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]]).to(dtype),
    ):
        agree(getattr(ops, op)(x), getattr(reference, op)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (64, 32), (80, 20), (128, 128)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(isa: str, dtype: torch.dtype, dim: int, rotary: int, interleaved: bool) -> None:
    from dougong_cpu import ops

    table = RopeTable(normal(50, rotary, seed=3), interleaved)
    positions = torch.tensor([0, 49, 7])
    x = normal(3, 5 * dim, dtype=dtype).view(3, 5, dim)[:, 1:4]
    agree(ops.rope(x, table, positions), reference.rope(x, table, positions))


def make_cache(layout: Any, kv_dtype: torch.dtype, dtype: torch.dtype, dim: int = 64, dim_v: int = 0) -> Any:
    from dougong_cpu.attention import CpuAttention
    from dougong_cpu.device import CpuDevice

    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=dim, head_dim_v=dim_v, dtype=dtype, kv_dtype=kv_dtype)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=8, kernel_block=8)
    device = CpuDevice()
    cache, other = device.empty_cache(group, 4), device.empty_cache(group, 4)
    for one in (cache, other):
        for plane in one.planes.values():
            plane.view(torch.uint8).fill_(0x7F)
    limits = Limits(max_rows=4, max_tokens=16, max_kv_len=32, max_blocks=4)
    return CpuAttention(spec, group, limits, device), cache, other


@pytest.mark.parametrize("layout", [NHD, HND])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", ["same", torch.int8, torch.float8_e4m3fn])
def test_write_changes_the_named_slots_only(isa: str, layout: Any, dtype: torch.dtype, kv: Any) -> None:
    kernel, cache, other = make_cache(layout, dtype if kv == "same" else kv, dtype, 40, 24)
    layer = LayerArgs(k_scale=0.013, v_scale=torch.tensor([0.021]))
    k, v = normal(5, 2, 100, dtype=dtype)[..., 7:47] * 2, normal(5, 2, 24, dtype=dtype, seed=1)
    k[0, 0, 0], k[0, 0, 1], k[1, 1, 3] = 1e4, -1e4, 0.0
    slots = torch.tensor([31, 0, 8, 15, 17])
    kernel.write(layer, k, v, cache, slots)
    other.write_scaled(layer, k, v, slots)
    for name in cache.planes:
        assert torch.equal(cache.planes[name].view(torch.uint8), other.planes[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [None, 0.0, 1.0])
@pytest.mark.parametrize("layout", [NHD, HND])
@pytest.mark.parametrize("kv", ["same", torch.int8])
def test_qk_norm_rope_write(isa: str, dtype: torch.dtype, norms: float | None, layout: Any, kv: Any) -> None:
    from dougong_cpu import ops

    _, cache, other = make_cache(layout, dtype if kv == "same" else kv, dtype)
    weights = (
        {} if norms is None else {"q_norm": normal(64, dtype=dtype, seed=4), "k_norm": normal(64, dtype=dtype, seed=5)}
    )
    shape = QKVShape(4, 2, 64, 64, norm_offset=norms or 0.0, **weights)
    table = RopeTable(normal(40, 64, seed=6))
    layer = LayerArgs(k_scale=0.05, v_scale=0.04) if kv != "same" else LayerArgs()
    for tokens in (1, 3):
        qkv = normal(tokens, 600, dtype=dtype, seed=tokens)[:, 30 : 30 + 8 * 64]
        positions, slots = torch.arange(tokens) + 5, torch.arange(tokens) * 9 + 2
        want = reference.qk_norm_rope_write(qkv.clone(), shape, table, positions, layer, other, slots)
        got = ops.qk_norm_rope_write(qkv, shape, table, positions, layer, cache, slots)
        agree(got, want)
        if kv == "same":
            close = CLOSE[dtype]
            for mine, theirs in ((cache.k, other.k), (cache.v, other.v)):
                torch.testing.assert_close(mine, theirs, equal_nan=True, **close)
        else:
            assert int((cache.k.int() - other.k.int()).abs().max()) <= 1
            assert torch.equal(cache.v, other.v)


def test_rope_without_table_or_cache(isa: str) -> None:
    from dougong_cpu import ops

    shape = QKVShape(4, 2, 64, 64)
    qkv = normal(2, 8 * 64)
    got = ops.qk_norm_rope_write(
        qkv.clone(),
        shape,
        None,
        torch.zeros(2, dtype=torch.int64),
        LayerArgs(),
        None,
        torch.zeros(2, dtype=torch.int64),
    )
    assert torch.equal(got, qkv[:, :256].view(2, 4, 64))


def test_conversions_are_exact(isa: str) -> None:
    """All fp8 codes read right, and every float rounds as torch rounds it (through a cache of one slot a head)."""
    from dougong_cpu import ops

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    edges = torch.cat(
        (codes, (codes[1:] + codes[:-1]) / 2, codes * 1.03, torch.tensor([0.0, -0.0, 2.0**-10, 1000.0, math.nan]))
    )
    padded = torch.zeros(-(-edges.numel() // 128) * 128)
    padded[: edges.numel()] = edges
    kernel, cache, other = make_cache(NHD, torch.float8_e4m3fn, torch.float32)
    x = padded.view(-1, 2, 64)
    slots = torch.arange(x.shape[0])
    kernel.write(LayerArgs(), x, x, cache, slots)
    other.write_scaled(LayerArgs(), x, x, slots)
    assert torch.equal(cache.k.float().nan_to_num(77), other.k.float().nan_to_num(77))
    for dtype in (torch.bfloat16, torch.float16):
        kernel, cache, other = make_cache(NHD, dtype, dtype)
        values = torch.cat(
            (edges * 0.37, edges * 1e-5, edges * 1e-8, torch.tensor([65504.0, 65519.0, 65520.0, 1e-8, math.inf]))
        )
        wide = torch.ones(64, values.numel()).mul_(values).T.contiguous()  # each value in a row of its own
        weight = torch.ones(64)
        got = ops.rms_norm(wide.to(dtype), weight.to(dtype), 1e-6)
        agree(got.nan_to_num(0), reference.rms_norm(wide.to(dtype), weight.to(dtype), 1e-6).nan_to_num(0))
