"""Products with packed weights: against float64, on every format, tile height and edge."""

from __future__ import annotations

import pytest
import torch

from dougong.hal import LinearQuery, QuantizedWeight
from dougong.hal.reference.linear import quantize_weight
from dougong_cpu import packing
from dougong_cpu.device import CpuDevice
from dougong_cpu.linear import CpuLinear

FORMATS = ["f32", "bf16", "f16", "i8_channel", "i8_group", "i4_min", "i4_sym"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_in(format: str, n: int, k: int) -> packing.PackedWeight:
    w = normal(n, k, seed=n + k)
    if format == "i4_min":
        return packing.pack_int4(*packing.quantize_int4(w))
    if format == "i4_sym":
        q, scale, _ = packing.quantize_int4(w)
        return packing.pack_int4(q, scale, None)
    if format.startswith("i8"):
        groups = w.view(n, -1, 32) if format == "i8_group" else w.view(n, 1, k)
        scale = groups.abs().amax(-1) / 127
        scale = scale.half().float() if format == "i8_group" else scale
        q = (groups / scale[..., None]).round().clamp(-127, 127).to(torch.int8).view(n, k)
        return packing.pack_int8(q, scale)
    return packing.pack_dense(w.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[format]))


def kernel(n: int, k: int, dtype: torch.dtype = torch.float32, format: str = "int4", group: int = 32) -> CpuLinear:
    return CpuLinear(
        LinearQuery(in_features=k, out_features=n, dtype=dtype, format=format, group_size=group), CpuDevice()
    )


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (100, 96), (7, 32), (130, 160)])
def test_every_format_and_height(isa: str, format: str, n: int, k: int) -> None:
    linear = kernel(n, k)
    packed = linear.prepare(weight_in(format, n, k))
    exact = packing.unpack(packed).double()
    for m in (1, 2, 3, 4, 5, 8, 9, 12, 13, 17, 24, 25, 40):
        x = normal(m, k, seed=m)
        assert error(linear.apply(x, packed), x.double() @ exact.T) < 1e-6, m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
def test_dtypes_bias_strides_and_batches(isa: str, dtype: torch.dtype, format: str) -> None:
    n, k = 70, 64
    linear = kernel(n, k, dtype, format)
    packed = linear.prepare(normal(n, k))
    exact = packing.unpack(packed).double()
    bias = normal(n, seed=9).to(dtype)
    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for x in (
        normal(3, k).to(dtype),
        normal(2, 5, k).to(dtype),
        normal(4, 3 * k).to(dtype)[:, 5 : 5 + k],
        normal(k, 3).to(dtype).T,
    ):
        want = x.double() @ exact.T
        assert linear.apply(x, packed).dtype == dtype
        assert error(linear.apply(x, packed), want) < limit
        assert error(linear.apply(x, packed, bias), want + bias.double()) < limit
    assert linear.apply(normal(0, k).to(dtype), packed).shape == (0, n)


def test_dense_inputs_that_fill_no_group(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        linear = kernel(33, 45, dtype, "dense")
        packed = linear.prepare(normal(33, 45))
        assert torch.equal(packing.unpack(packed), normal(33, 45).to(dtype).float())
        x = normal(3, 45, seed=2).to(dtype)
        assert error(linear.apply(x, packed), x.double() @ normal(33, 45).to(dtype).double().T) < 4e-3


@pytest.mark.parametrize("format", FORMATS)
def test_unpack_gives_back_what_was_packed(format: str) -> None:
    w = weight_in(format, 100, 96)
    again = packing.unpack(w)
    assert again.shape == (100, 96)
    limit = {"f32": 1e-7, "bf16": 3e-3, "f16": 3e-4, "i8_channel": 0.01, "i8_group": 0.006, "i4_min": 0.1, "i4_sym": 9}
    assert error(again, normal(100, 96, seed=196).double()) < limit[format]


@pytest.mark.parametrize("group", [32, 64])
def test_quantised_weights_keep_their_values(isa: str, group: int) -> None:
    given = quantize_weight(normal(40, 128), "int4", group)
    halves = QuantizedWeight("int4", given.q, given.scale.half(), given.minimum.half(), group, given.shape)  # type: ignore[union-attr]
    linear = kernel(40, 128, group=group)
    assert torch.equal(linear.unpack(linear.prepare(halves)), halves.dequantize())
    no_minimum = QuantizedWeight("int4", given.q, given.scale.half(), None, group, given.shape)
    assert torch.equal(linear.unpack(linear.prepare(no_minimum)), no_minimum.dequantize())
    eight = quantize_weight(normal(40, 128), "int8")
    linear = kernel(40, 128, format="int8")
    assert torch.equal(linear.unpack(linear.prepare(eight)), eight.dequantize())


def test_gguf_blocks_stay_as_they_are(isa: str) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    w = normal(48, 128).numpy()
    for kind, pack in (
        (GGMLQuantizationType.Q4_1, packing.from_gguf_q4_1),
        (GGMLQuantizationType.Q4_0, packing.from_gguf_q4_0),
        (GGMLQuantizationType.Q8_0, packing.from_gguf_q8_0),
    ):
        raw = quants.quantize(w, kind)
        want = torch.from_numpy(np.ascontiguousarray(quants.dequantize(raw, kind))).float()
        packed = pack(torch.from_numpy(np.ascontiguousarray(raw)), (48, 128))
        assert torch.equal(packing.unpack(packed), want)
        linear = kernel(48, 128)
        x = normal(3, 128, seed=1)
        assert error(linear.apply(x, linear.prepare(packed)), x.double() @ want.double().T) < 1e-6
        with pytest.raises(ValueError, match="expected"):
            pack(torch.zeros(100, dtype=torch.uint8), (48, 128))


def test_four_bits_take_five() -> None:
    packed = weight_in("i4_min", 640, 512)
    assert packed.nbytes * 8 == 640 * 512 * 5


def test_threads_change_no_bit(isa: str) -> None:
    from dougong_cpu import threads

    linear = kernel(300, 64)
    packed = linear.prepare(normal(300, 64))
    x = normal(5, 64)
    want = linear.apply(x, packed)
    threads.count = 4
    try:
        assert torch.equal(linear.apply(x, packed), want)
    finally:
        threads.refresh()
