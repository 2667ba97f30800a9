"""Matrix products with a weight that was prepared once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dougong.hal.attention import Refusal

if TYPE_CHECKING:
    from dougong.hal.device import Device

__all__ = ["LinearKernel", "LinearQuery", "QuantizedWeight"]


@dataclass(frozen=True, kw_only=True)
class LinearQuery:
    """A linear layer: y[..., O] = x[..., I] · Wᵀ + b.

    ``format`` is ``"dense"`` (the weight in ``dtype``), ``"int8"`` (a scale per output row), ``"int4"`` (groups of
    ``group_size`` along I with a scale and a minimum each) or ``"fp8"`` (a scale per output row, and the activations
    rounded too, with a scale per token; it has no reference: a device without such products refuses it).
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    format: str = "dense"
    group_size: int = 32


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of shape [O, I] that is already quantised: ``w = q * scale + minimum`` group by group.

    int4: q [O, I/2] uint8, two values a byte, element 2j in the low nibble, values 0 to 15; scale and minimum
    [O, I/group_size] float32 or float16. int8: q [O, I] int8, scale [O, 1], minimum None.
    """

    format: str
    q: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    group_size: int
    shape: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [O, I] in ``dtype``."""
        rows, columns = self.shape
        if self.format == "int8":
            return (self.q.float() * self.scale.float()).to(dtype)
        values = torch.stack((self.q & 15, self.q >> 4), dim=-1).reshape(rows, -1, self.group_size).float()
        out = values * self.scale.float()[..., None]
        if self.minimum is not None:
            out = out + self.minimum.float()[..., None]
        return out.reshape(rows, columns).to(dtype)


class LinearKernel(ABC):
    """One per (in, out, dtype, format). Prepacking, vendor tile orders and low-bit formats live here.

    ``prepare`` runs once per layer, after sharding; ``apply`` in every step.
    """

    def __init__(self, query: LinearQuery, device: Device) -> None:
        self.query = query
        self.device = device

    @classmethod
    @abstractmethod
    def supports(cls, query: LinearQuery, device: Device) -> tuple[Refusal, ...]:
        """Every reason against this query."""

    @abstractmethod
    def prepare(self, weight: torch.Tensor | QuantizedWeight) -> Any:
        """Pack the weight [O, I] (any float dtype, any device, or already quantised) for ``apply``."""

    @abstractmethod
    def apply(self, x: torch.Tensor, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., I] in the query's dtype -> [..., O] in the same."""

    @abstractmethod
    def unpack(self, packed: Any) -> torch.Tensor:
        """The weight [O, I] in the query's dtype as ``apply`` uses it (rounded, where it was quantised)."""
