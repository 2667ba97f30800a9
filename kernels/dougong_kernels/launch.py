"""Launching a compiled Triton kernel again without its just-in-time front end, which costs tens of microseconds."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from dougong_kernels.target import interpreted

__all__ = ["Launcher", "aligned"]


def aligned(*tensors: torch.Tensor | None) -> int:
    """Bit i: tensor i is missing or starts at a multiple of 16 bytes (the compiler assumes it of the first call's)."""
    bits = 0
    for at, tensor in enumerate(tensors):
        if tensor is None or tensor.data_ptr() % 16 == 0:
            bits |= 1 << at
    return bits


class Launcher:
    """A kernel and what it was compiled to, by key.

    The caller's key must hold all that the compiler specialises on: constexprs, dtypes, whether pointers are aligned
    (``aligned``) and the integers that are not in ``do_not_specialize`` (strides). Arguments are positional and
    complete, constexprs included.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Any] = {}
        self.interpreted = interpreted()

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = self.kernel[grid](*args, **options)
        if not self.interpreted and compiled is not None:
            self.compiled[key] = compiled
