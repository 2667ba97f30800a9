"""Products in 8-bit floats: rounding, their error, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import BF16, Here

from dougong.errors import KernelSelectionError
from dougong.hal import LinearQuery, QuantizedWeight
from dougong.hal.backend import Backend
from dougong.hal.selection import Candidate
from dougong.models.quantization import find_format
from dougong.plugins import load_plugins
from dougong_cuda import fp8
from dougong_cuda.fp8 import Fp8Linear, Fp8Weight
from dougong_cuda.providers import kernel_specs
from dougong_cuda.quantize import quantize_rows


def query(**more: Any) -> LinearQuery:
    return LinearQuery(**{**dict(in_features=64, out_features=32, dtype=BF16, format="fp8"), **more})


def backend(device: Here) -> Backend:
    found = Backend("cuda", "cuda", device, load_plugins("", entries=()))
    found.candidates["linear"] = [Candidate("cuda", one) for one in kernel_specs(device) if one.op == "linear"]  # type: ignore[arg-type]
    return found


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` in torch."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("width", [16, 48, 200])
def test_rows_are_rounded_as_torch_rounds_them(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * width).to(BF16)[:, :width] * torch.tensor([[1.0], [1e-3], [0.0], [300.0], [1.0]]).to(BF16)
    q, scale = quantize_rows(x)
    want, want_scale = rounded_rows(x)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0.0)
    expected = want.float()
    # A quotient may fall on the other side of a tie between two neighbours; and the interpreter loses the carry of one
    # that rounds up to a power of two.
    carried = torch.frexp(expected)[0].abs() == 0.5
    assert ((q.float() - expected).abs() <= expected.abs() / 8 + 2**-9)[~carried].all()
    assert (q.float() != expected).float().mean() < 0.05
    assert quantize_rows(x[:0])[0].shape == (0, width)


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (0, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_near_the_dense_one(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "quantize_rows", rounded_rows)  # see above
    torch.manual_seed(1)
    kernel = Fp8Linear(query(), Here())
    weight = torch.randn(32, 64) * torch.logspace(-3, 2, 32)[:, None]
    packed = kernel.prepare(weight)
    x = torch.randn(shape).to(BF16)
    b = torch.randn(32).to(BF16) if bias else None
    got = kernel.apply(x, packed, b)
    want = torch.nn.functional.linear(x.float(), weight, None if b is None else b.float())
    assert got.dtype == BF16 and got.shape == (*shape[:-1], 32)
    if got.numel():
        error = (got.float() - want).norm() / want.norm()
        assert float(error) < 0.05
        # Of what was rounded, the product is exact but for its sums and its own rounding.
        q, scale = rounded_rows(x.reshape(-1, 64))
        exact = (q.float() * scale) @ (packed.q.float() * packed.scale).T + (0.0 if b is None else b.float())
        torch.testing.assert_close(got.reshape(-1, 32).float(), exact, rtol=2**-7, atol=1e-3)
    rounded = kernel.unpack(packed).float()
    assert ((rounded - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.04


def test_a_weight_of_another_format_is_rounded_anew() -> None:
    q = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    stored = QuantizedWeight("int8", q, torch.full((32, 1), 0.01), None, 64, (32, 64))
    packed = Fp8Linear(query(), Here()).prepare(stored)
    assert isinstance(packed, Fp8Weight)
    torch.testing.assert_close(packed.q.float() * packed.scale, stored.dequantize(), rtol=0.07, atol=0.01)


@pytest.mark.parametrize(
    ("capability", "more", "words"),
    [
        ((8, 0), {}, "compute capability 8.0 has no 8-bit float products"),
        ((9, 0), dict(dtype=torch.float16), "does bfloat16"),
        ((9, 0), dict(in_features=72), "32 x 72: both must be multiples of 16"),
        ((9, 0), dict(out_features=33), "multiples of 16"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_stands_in(
    capability: tuple[int, int], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(KernelSelectionError, match=words) as caught:
        backend(Here(capability)).choose_linear(query(**more))
    assert "torch reference (dougong): lacks fp8" in str(caught.value)


def test_the_option_and_who_serves_it() -> None:
    found = find_format("fp8")
    assert (found.linear, found.head) == ("fp8", "dense")
    here = backend(Here())
    assert here.choose_linear(query()).spec.provider == "torch fp8"
    dense = here.choose_linear(query(format="dense"))
    assert dense.spec.provider == "triton" or "Triton" in str(dense.refused)
