"""Matrix products with weights packed for the C++ kernels: dense, int8 and int4."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch

from dougong.hal import Device, LinearKernel, LinearQuery, QuantizedWeight, Refusal
from dougong_cpu import packing, threads
from dougong_cpu._values import DTYPES
from dougong_cpu.library import load
from dougong_cpu.packing import GROUP, PANEL, PackedWeight

__all__ = ["CpuLinear"]

_empty = torch.empty


class CpuLinear(LinearKernel):
    """Sums in float32 over weights that stay as small as their format; values are widened in registers."""

    @classmethod
    def supports(cls, query: LinearQuery, device: Device) -> tuple[Refusal, ...]:
        refusals = []
        if device.type != "cpu":
            refusals.append(Refusal(f"device {device.type}: runs on cpu"))
        if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            refusals.append(Refusal(f"activations in {query.dtype}", "float32, bfloat16 or float16"))
        if query.format not in ("dense", "int8", "int4"):
            refusals.append(Refusal(f"weight format {query.format}", "dense, int8 or int4"))
        if query.format == "int4" and (query.group_size % GROUP or query.in_features % query.group_size):
            refusals.append(
                Refusal(
                    f"int4 groups of {query.group_size} over {query.in_features} inputs",
                    f"a group size that {GROUP} divides and that divides the inputs",
                )
            )
        return tuple(refusals)

    def __init__(self, query: LinearQuery, device: Device) -> None:
        super().__init__(query, device)
        self._product = load().product
        self._dtype = query.dtype
        self._out = query.out_features

    def prepare(self, weight: torch.Tensor | QuantizedWeight | PackedWeight) -> PackedWeight:
        """Also takes a ``PackedWeight`` (GGUF blocks packed by ``dougong_cpu.packing``)."""
        if isinstance(weight, PackedWeight):
            packed = weight
        elif isinstance(weight, QuantizedWeight):
            packed = self._prepare_quantized(weight)
        elif self.query.format == "dense":
            packed = packing.pack_dense(weight.to("cpu", self._dtype))
        elif self.query.format == "int8":
            wide = weight.detach().to("cpu", torch.float32)
            scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            packed = packing.pack_int8((wide / scale).round().to(torch.int8), scale)
        else:
            packed = packing.pack_int4(*packing.quantize_int4(weight, self.query.group_size))
        packed.call.x_dtype = packed.call.y_dtype = DTYPES[self._dtype]
        threads.refresh()
        return packed

    def _prepare_quantized(self, weight: QuantizedWeight) -> PackedWeight:
        if self.query.format == "dense":
            return packing.pack_dense(weight.dequantize(self._dtype))
        if weight.format == "int8":
            return packing.pack_int8(weight.q, weight.scale)
        repeat = weight.group_size // GROUP
        scale, minimum = weight.scale, weight.minimum
        if repeat > 1:
            scale = scale.repeat_interleave(repeat, dim=1)
            minimum = None if minimum is None else minimum.repeat_interleave(repeat, dim=1)
        if minimum is None:  # q * scale without a zero point: the symmetric format would subtract 8
            minimum = torch.zeros_like(scale)
        return packing.pack_int4(weight.q, scale, minimum)

    def apply(self, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dim() != 2 or bias is not None or x.stride(1) != 1:
            return self._apply_general(x, packed, bias)
        assert x.dtype is self._dtype, f"activations in {x.dtype}; this product was made for {self._dtype}"
        m = x.shape[0]
        y = _empty((m, self._out), dtype=self._dtype)
        self._product(packed.address, x.data_ptr(), y.data_ptr(), m, x.stride(0), threads.count)
        return y

    def _apply_general(self, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = _empty((rows.shape[0], self._out), dtype=self._dtype)
        call = packed.with_bias(bias) if bias is not None else packed.call
        self._product(addressof(call), rows.data_ptr(), y.data_ptr(), rows.shape[0], rows.stride(0), threads.count)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self._out)

    def unpack(self, packed: Any) -> torch.Tensor:
        return packing.unpack(packed).to(self._dtype)


assert PANEL % GROUP == 0
