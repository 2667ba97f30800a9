"""``quantization="fp8"``: weights and activations in 8-bit floats, a scale per output and per token, through torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dougong.hal import Device, LinearKernel, LinearQuery, QuantizedWeight, Refusal
from dougong_cuda.flash import capability
from dougong_cuda.quantize import LARGEST, quantize_rows

__all__ = ["Fp8Linear", "Fp8Weight"]


@dataclass(frozen=True)
class Fp8Weight:
    """w = q * scale. q [O, I] float8_e4m3fn, scale [O, 1] float32."""

    q: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Weight:
        """Round a weight [O, I]; a block of rows at a time, so that little is held in float32."""
        q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        for start in range(0, weight.shape[0], 4096):
            rows = weight[start : start + 4096].float()
            factor = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / LARGEST
            scale[start : start + 4096] = factor
            q[start : start + 4096] = (rows / factor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return cls(q, scale)


class Fp8Linear(LinearKernel):
    """``torch._scaled_mm`` with a scale per row and per column: half a dense weight's bytes, and up to twice its
    arithmetic. Each activation's row is scaled by its own largest value."""

    @classmethod
    def supports(cls, query: LinearQuery, device: Device) -> tuple[Refusal, ...]:
        refusals = []
        if query.format != "fp8":
            refusals.append(Refusal(f"format {query.format}", "fp8"))
        found = capability(device)
        if found < (8, 9):
            refusals.append(
                Refusal(f"compute capability {found[0]}.{found[1]} has no 8-bit float products", "8.9; or int8")
            )
        if query.dtype != torch.bfloat16:
            refusals.append(
                Refusal(f"activations in {query.dtype}: products with row scales give bfloat16", "bfloat16")
            )
        if query.in_features % 16 or query.out_features % 16:
            refusals.append(
                Refusal(f"{query.out_features} x {query.in_features}: both must be multiples of 16", "int8 or dense")
            )
        if not hasattr(torch, "_scaled_mm"):
            refusals.append(Refusal(f"torch {torch.__version__} has no scaled products", "another torch"))
        return tuple(refusals)

    def prepare(self, weight: torch.Tensor | QuantizedWeight) -> Fp8Weight:
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(self.query.dtype)
        return Fp8Weight.of(weight.to(self.device.torch_device))

    def apply(self, x: torch.Tensor, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(packed, Fp8Weight)
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        shape = (*x.shape[:-1], packed.q.shape[0])
        if not flat.shape[0]:
            return x.new_empty(shape)
        q, scale = quantize_rows(flat)
        out = torch._scaled_mm(
            q, packed.q.t(), scale_a=scale, scale_b=packed.scale.t(), bias=bias, out_dtype=self.query.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return out.view(shape)

    def unpack(self, packed: Any) -> torch.Tensor:
        assert isinstance(packed, Fp8Weight)
        return (packed.q.float() * packed.scale).to(self.query.dtype)
