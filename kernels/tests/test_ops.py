"""The functional ops against the hal's references. float16: the interpreter rounds bfloat16 toward zero."""

from __future__ import annotations

import pytest
import torch

from dougong.hal import (
    HND,
    NHD,
    X_PACKED,
    AttentionSpec,
    KVLayout,
    LayerArgs,
    LayerCache,
    QKVShape,
    RopeTable,
    allocate_cache,
)
from dougong.hal.reference import ops as reference
from dougong.hal.reference import sampling
from dougong_kernels.ops import draw, gemv, pointwise, skinny, write

F16 = torch.float16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(got: torch.Tensor, want: torch.Tensor, ulps: float = 1.0) -> None:
    """Equal up to `ulps` units of the last place: a sum in another order may round the other way."""
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=ulps * torch.finfo(want.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [96, 1024])
def test_rms_norm(size: int, offset: float) -> None:
    x, r, w = torch.randn(5, size).to(F16), torch.randn(5, size).to(F16), torch.randn(size).to(F16)
    close(pointwise.rms_norm(x, w, 1e-6, offset), reference.rms_norm(x, w, 1e-6, offset))
    packed = torch.randn(4, 3 * size).to(F16)[:, size : 2 * size]
    close(pointwise.rms_norm(packed, w, 1e-6, offset), reference.rms_norm(packed, w, 1e-6, offset))
    want = reference.add_rms_norm(x, r, w, 1e-5, offset)
    got = pointwise.add_rms_norm(x.clone(), r.clone(), w, 1e-5, offset)
    close(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert pointwise.rms_norm(x[:0], w, 1e-6).shape == (0, size)


def test_gated_activations_at_all_magnitudes() -> None:
    x = torch.cat((torch.randn(3, 40), torch.randn(3, 40) * 100)).to(F16)
    close(pointwise.silu_mul(x), reference.silu_mul(x))
    close(pointwise.gelu_tanh_mul(x), reference.gelu_tanh_mul(x), 2.0)


def test_merge_of_empty_and_poisoned_parts() -> None:
    a, b = torch.randn(2, 4, 3, 24).to(F16)
    la, lb = torch.randn(2, 4, 3)
    la[0], a[0] = -torch.inf, torch.nan
    lb[:2], b[:2] = -torch.inf, torch.nan
    got, want = pointwise.merge_lse(a, la, b, lb), reference.merge_lse(a, la, b, lb)
    close(got[0], want[0])
    assert (got[0][0] == 0).all() and (got[1][0] == -torch.inf).all()
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (40, 24), (64, 16)])
def test_rope(dim: int, rotary: int, interleaved: bool) -> None:
    table = RopeTable(torch.randn(50, rotary), interleaved)
    x, positions = torch.randn(6, 3, dim).to(F16), torch.randint(0, 50, (6,))
    close(write.rope(x, table, positions), reference.rope(x, table, positions))


@pytest.mark.parametrize(
    ("kv_dtype", "norm", "layout"),
    [(F16, None, NHD), (F16, 0.0, HND), (F16, 1.0, NHD), (torch.int8, 0.0, HND), (torch.float8_e4m3fn, 0.0, NHD),
     (torch.float8_e4m3fnuz, 0.0, X_PACKED), (F16, 0.0, X_PACKED)],
)  # fmt: skip
def test_qk_norm_rope_write(kv_dtype: torch.dtype, norm: float | None, layout: KVLayout) -> None:
    dim, rotary, heads, kv_heads = 48 if layout is X_PACKED else 40, 24, 5, 5
    weights = (None, None) if norm is None else (torch.randn(dim).to(F16), torch.randn(dim).to(F16))
    shape = QKVShape(heads, kv_heads, dim, 24, *weights, norm_offset=norm or 0.0)
    spec = AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, head_dim_v=24, dtype=F16, kv_dtype=kv_dtype
    )
    first = allocate_cache(spec, layout, 5, 16, "cpu")
    for plane in first.planes.values():
        plane.view(torch.uint8).fill_(7)
    second = LayerCache({n: x.clone() for n, x in first.planes.items()}, layout, 16, spec)
    qkv = torch.randn(6, sum(shape.splits)).to(F16)
    slots = torch.tensor([3, 70, 17, 5, 6, 79])
    layer = LayerArgs(torch.tensor([0.02]), 0.03)
    table, positions = RopeTable(torch.randn(50, rotary)), torch.randint(0, 50, (6,))
    want = reference.qk_norm_rope_write(qkv.clone(), shape, table, positions, layer, first, slots)
    got = write.qk_norm_rope_write(qkv.clone(), shape, table, positions, layer, second, slots)
    close(got, want, 2.0)
    assert torch.equal(first.planes["v"].view(torch.uint8), second.planes["v"].view(torch.uint8))
    differ = first.planes["k"].view(torch.uint8) != second.planes["k"].view(torch.uint8)
    assert differ.float().mean() < 0.002, "more than a rare rounding differs"
    untouched = write.qk_norm_rope_write(qkv.clone(), shape, None, positions, layer, None, slots)
    close(untouched, reference.qk_norm_rope_write(qkv.clone(), shape, None, positions, layer, None, slots), 2.0)


@pytest.mark.parametrize("kv_dtype", [F16, torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_write_saturates_and_rounds_like_the_reference(kv_dtype: torch.dtype) -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=16, dtype=F16, kv_dtype=kv_dtype)
    first = allocate_cache(spec, NHD, 3, 16, "cpu")
    for plane in first.planes.values():
        plane.view(torch.uint8).zero_()
    second = LayerCache({n: x.clone() for n, x in first.planes.items()}, NHD, 16, spec)
    k = (torch.randn(4, 2, 16) * torch.logspace(-5, 3, 16)).to(F16)
    v = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0, -1000.0, 0.001953, 0.0009765, 0.0, -0.0, 448, 464, 17, 18, 19])
    v = v.to(F16).expand(4, 2, 16)
    slots = torch.tensor([0, 47, 16, 20])
    for cache, do in ((first, first.write_scaled), (second, None)):
        layer = LayerArgs(1.0, 1.0)
        if do is not None:
            do(layer, k, v, slots)
        else:
            write.write(layer, k, v, cache, slots)
    for name in ("k", "v"):
        assert torch.equal(first.planes[name].view(torch.uint8), second.planes[name].view(torch.uint8))


def test_layouts_that_the_kernels_cannot_reach_are_refused() -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=16, dtype=F16)
    cache = allocate_cache(spec, KVLayout("odd", {"k": "b d n h", "v": "b n h d"}), 3, 16, "cpu")
    with pytest.raises(ValueError, match="cannot read it"):
        write.write(LayerArgs(), torch.zeros(1, 2, 16).to(F16), torch.zeros(1, 2, 16).to(F16), cache, torch.tensor([0]))


K = torch.tensor([5, 3, 0, 40, 1, 2000])
P = torch.tensor([0.5, 0.9, 0.3, 1.0, 0.2, 0.95])
MIN_P = torch.tensor([0, 0.1, 0, 0.05, 0, 0.2])


@pytest.mark.parametrize(
    "limits", [(None, None, None), (K, None, None), (None, P, None), (None, None, MIN_P), (K, P, MIN_P)]
)
@pytest.mark.parametrize("vocabulary", [300, 4500])
def test_sample_draws_what_the_reference_draws(limits: tuple, vocabulary: int) -> None:
    if vocabulary > 1000 and any(limit is not None for limit in limits[:2]):
        vocabulary = 2300
    logits = torch.randn(6, vocabulary) * 3
    heat = torch.tensor([0.0, 1, 0.7, 1.5, 1, 1])
    seeds, positions = torch.arange(6), torch.arange(6) * 7
    want = sampling.sample(logits.clone(), heat, *limits, seeds, positions)
    for _ in range(2):  # the second call finds the counters as the first left them
        assert draw.sample(logits, heat, *limits, seeds, positions).tolist() == want.tolist()


def test_greedy_takes_the_lowest_of_equals_and_top_k_keeps_ties() -> None:
    logits = torch.zeros(2, 300)
    logits[0, [77, 280]] = 1.0
    zero = torch.zeros(2)
    assert draw.sample(logits, zero, None, None, None, torch.arange(2), torch.arange(2)).tolist() == [77, 0]
    drawn = {
        int(
            draw.sample(
                logits[:1],
                torch.ones(1),
                torch.ones(1, dtype=torch.int64),
                None,
                None,
                torch.tensor([s]),
                torch.zeros(1, dtype=torch.int64),
            )[0]
        )
        for s in range(6)
    }
    assert drawn == {77, 280}


@pytest.mark.parametrize(
    ("outputs", "inputs", "cores", "expected"),
    [
        (28672, 4096, 132, (64, 128, 1)),  # Llama-8B's gate and up
        (4096, 14336, 132, (32, 256, 1)),
        (1024, 3072, 132, (32, 256, 4)),  # Qwen3-0.6B's down
        (1024, 256, 132, (32, 256, 1)),  # too few inputs to share
        (3, 5000, 4, (32, 256, 4)),
        (50, 96, 4, (32, 128, 1)),
        (100000, 64, 132, (32, 64, 1)),
    ],
)
def test_products_of_few_rows_are_cut_so_that_most_cores_have_some(
    outputs: int, inputs: int, cores: int, expected: tuple[int, int, int]
) -> None:
    cut = skinny.Cut.of(outputs, inputs, cores, large=True)
    assert (cut.outputs, cut.inputs, cut.split) == expected
    small = skinny.Cut.of(outputs, inputs, cores, large=False)
    held = 2 * small.stages * small.inputs * (small.outputs + skinny.MAX_ROWS)
    assert held <= 64 << 10, "bytes of shared memory that every target has"


def test_programs_that_share_inputs_leave_their_counters_as_they_found_them() -> None:
    product = skinny.Skinny(40, 2000, F16, torch.device("cpu"))
    assert product.cut.split == 2
    w = (torch.randn(40, 2000) / 2000**0.5).to(F16)
    for rows in (2, 16, 5):
        x = torch.randn(rows, 4000).to(F16)[:, :2000]
        close(product(x, w), (x.double() @ w.double().T).to(F16), 4.0)


@pytest.mark.parametrize("rows", [1, 3, 9, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 50), (5000, 3), (1024, 64), (128, 384)])
def test_skinny_products(rows: int, inputs: int, outputs: int) -> None:
    x, w = torch.randn(rows, inputs).to(F16), (torch.randn(outputs, inputs) / inputs**0.5).to(F16)
    bias, residual = torch.randn(outputs).to(F16), torch.randn(rows, outputs).to(F16)
    want = (x.double() @ w.double().T + bias.double()).to(F16) + residual
    close(gemv.linear(x, w, bias, residual=residual), want, 4.0)
    if rows <= gemv.MAX_FUSED_ROWS:
        norm = torch.randn(inputs).to(F16)
        want = (reference.rms_norm(x, norm, 1e-6).double() @ w.double().T).to(F16)
        torch.testing.assert_close(
            gemv.linear(x, w, prologue="rms_norm", norm=norm, eps=1e-6), want, rtol=4e-3, atol=4e-3
        )
        packed = torch.randn(rows, 2 * inputs).to(F16)
        for name, op in (("silu_mul", reference.silu_mul), ("gelu_tanh_mul", reference.gelu_tanh_mul)):
            want = (op(packed).double() @ w.double().T).to(F16)
            torch.testing.assert_close(gemv.linear(packed, w, prologue=name), want, rtol=4e-3, atol=4e-3)
    else:
        with pytest.raises(ValueError, match="at most"):
            gemv.linear(x, w, prologue="silu_mul")
