"""Buffers with guard words around them, and inputs that are compared before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dougong_compat.numbers import bits, same_bits

__all__ = ["Fenced", "Surroundings", "Watch", "poison"]

_FENCE = 64
#: Memory of more bytes than this is looked at only where tensors lie: most of a giant cache is never touched.
_MOST = 1 << 28
#: A NaN with this payload stands in the fence: arithmetic does not produce it by chance.
_WORD = {2: 0x7FA5, 4: 0x7FA5A5A5}


def poison(x: torch.Tensor, kind: str = "nan") -> torch.Tensor:
    """Fill ``x`` with what must not be read: NaN (int8: the loudest code), a loud finite value, or, ``stale``, such
    values as earlier requests leave behind, which nothing tells from those that count."""
    if kind == "stale":
        values = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
        x.copy_((values * 40).clamp(-127, 127).to(torch.int8) if x.dtype == torch.int8 else values.to(x.dtype))
    elif not x.dtype.is_floating_point:
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


def _around(x: torch.Tensor) -> torch.Tensor:
    """All of the memory that ``x`` is a part of, seen as its dtype; ``x`` itself where that is all, or too much."""
    size = x.untyped_storage().nbytes()
    if size > _MOST or size // x.element_size() == x.numel():
        return x
    return x.as_strided((size // x.element_size(),), (1,), 0)


class Surroundings:
    """The memory between tensors that a call may change: other layers' caches, the rest of a packed row."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = [x for x in tensors if _around(x) is not x]
        self.before = {x.untyped_storage().data_ptr(): _around(x).detach().clone() for x in self.tensors}

    def finding(self) -> str:
        """'' if nothing but the tensors themselves changed."""
        for x in self.tensors:  # what they hold now counts as expected
            kept = self.before[x.untyped_storage().data_ptr()]
            kept.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
        now = {x.untyped_storage().data_ptr(): _around(x) for x in self.tensors}
        wrong = sum(int((bits(now[at].cpu()) != bits(kept.cpu())).sum()) for at, kept in self.before.items())
        return f"wrote into memory beside the cache's planes: {wrong} elements" if wrong else ""


@dataclass
class Watch:
    """Tensors that a call must leave as they are, and the memory that they are slices of."""

    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.tensors = {
            name if (whole := _around(x)) is x else f"{name} or what lies around it": whole
            for name, x in self.tensors.items()
        }
        self.before = {name: x.detach().clone() for name, x in self.tensors.items()}

    def findings(self) -> list[str]:
        return [
            f"changed its input {name}: {self._count(name)} elements"
            for name, x in self.tensors.items()
            if not same_bits(x.cpu(), self.before[name].cpu())
        ]

    def _count(self, name: str) -> int:
        return int((bits(self.tensors[name].cpu()) != bits(self.before[name].cpu())).sum())
