"""Matrix products in plain torch. Quantised weights are kept small and widened for each product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dougong.hal.attention import Refusal
from dougong.hal.device import Device
from dougong.hal.linear import LinearKernel, LinearQuery, QuantizedWeight

__all__ = ["ReferenceLinear", "quantize_weight"]


def quantize_weight(weight: torch.Tensor, format: str, group_size: int = 32) -> QuantizedWeight:
    """Round a weight [O, I] to ``"int8"`` (a scale per row) or ``"int4"`` (scale and minimum per group).

    Raises:
        ValueError: int4, and the group size does not divide I.
    """
    rows, columns = weight.shape
    wide = weight.float()
    if format == "int8":
        scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return QuantizedWeight("int8", (wide / scale).round().to(torch.int8), scale, None, columns, (rows, columns))
    if format != "int4":
        raise ValueError(f"format {format!r}: 'int8' or 'int4'")
    if columns % group_size:
        raise ValueError(f"int4 groups of {group_size} do not divide {columns} columns")
    groups = wide.reshape(rows, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-12)
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).reshape(rows, columns)
    packed = q[:, 0::2] | (q[:, 1::2] << 4)
    return QuantizedWeight("int4", packed, scale, low, group_size, (rows, columns))


class ReferenceLinear(LinearKernel):
    """Any format on any device."""

    @classmethod
    def supports(cls, query: LinearQuery, device: Device) -> tuple[Refusal, ...]:
        if query.format == "int4" and query.in_features % query.group_size:
            return (Refusal(f"int4 groups of {query.group_size} do not divide {query.in_features} inputs"),)
        return ()

    def prepare(self, weight: torch.Tensor | QuantizedWeight) -> Any:
        where = self.device.torch_device
        if self.query.format == "dense":
            if isinstance(weight, QuantizedWeight):
                weight = weight.dequantize(self.query.dtype)
            return weight.to(where, self.query.dtype)
        if not isinstance(weight, QuantizedWeight):
            weight = quantize_weight(weight, self.query.format, self.query.group_size)
        minimum = None if weight.minimum is None else weight.minimum.to(where)
        return QuantizedWeight(
            weight.format, weight.q.to(where), weight.scale.to(where), minimum, weight.group_size, weight.shape
        )

    def apply(self, x: torch.Tensor, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = packed.dequantize(x.dtype) if isinstance(packed, QuantizedWeight) else packed
        return F.linear(x, weight, bias)

    def unpack(self, packed: Any) -> torch.Tensor:
        return packed.dequantize(self.query.dtype) if isinstance(packed, QuantizedWeight) else packed
