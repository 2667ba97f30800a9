"""Buffers with guard words around them, and inputs that are compared before and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dougong_compat.numbers import bits, same_bits

__all__ = ["Fenced", "Watch", "poison"]

_FENCE = 64
#: A NaN with this payload stands in the fence: arithmetic does not produce it by chance.
_WORD = {2: 0x7FA5, 4: 0x7FA5A5A5}


def poison(x: torch.Tensor, kind: str = "nan") -> torch.Tensor:
    """Fill ``x`` with what must not be read: NaN, a loud finite value, or (int8) the loudest code."""
    if not x.dtype.is_floating_point:
        x.fill_(-128 if x.dtype == torch.int8 else 0x7F)
    elif kind == "loud":
        x.fill_(min(3.0e4, torch.finfo(x.dtype).max))
    elif x.element_size() == 1:  # fp8: by pattern, since not every dtype can fill with NaN
        x.view(torch.uint8).fill_(0x80 if x.dtype == torch.float8_e4m3fnuz else 0x7F)
    else:
        x.fill_(float("nan"))
    return x


class Fenced:
    """A NaN-filled tensor with guard words before and after it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        count = 1
        for size in shape:
            count *= size
        self.word = _WORD[dtype.itemsize]
        integer = torch.int16 if dtype.itemsize == 2 else torch.int32
        self.raw = torch.full((count + 2 * _FENCE,), self.word, dtype=integer, device=device)
        self.tensor = self.raw[_FENCE : _FENCE + count].view(dtype).view(shape)
        self.tensor.fill_(float("nan"))

    def finding(self, name: str) -> str:
        """'' if the fence stands, else what was written over."""
        raw = self.raw.cpu()
        before, after = raw[:_FENCE] != self.word, raw[raw.numel() - _FENCE :] != self.word
        if bool(before.any()) or bool(after.any()):
            return f"wrote outside {name}: {int(before.sum())} words before it and {int(after.sum())} after"
        return ""


@dataclass
class Watch:
    """Tensors that a call must leave as they are."""

    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.before = {name: x.detach().clone() for name, x in self.tensors.items()}

    def findings(self) -> list[str]:
        return [
            f"changed its input {name}: {self._count(name)} elements"
            for name, x in self.tensors.items()
            if not same_bits(x.cpu(), self.before[name].cpu())
        ]

    def _count(self, name: str) -> int:
        return int((bits(self.tensors[name].cpu()) != bits(self.before[name].cpu())).sum())
