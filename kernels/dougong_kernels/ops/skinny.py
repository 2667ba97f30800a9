"""Products of 2 to 16 rows on the matrix units: one kernel for all shapes, its cut chosen by the weight's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dougong_kernels.launch import Launcher, signature
from dougong_kernels.target import cores, early_start, interpreted
from dougong_kernels.triton.skinny import skinny_kernel

__all__ = ["MAX_ROWS", "Cut", "Skinny"]

MAX_ROWS = 16
_SKINNY = Launcher(skinny_kernel)


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Cut:
    """Outputs and inputs in a tile, programs that share the same outputs' inputs, tiles in flight."""

    outputs: int
    inputs: int
    split: int
    stages: int

    @staticmethod
    def of(outputs: int, inputs: int, cores: int, large: bool) -> Cut:
        """Wide tiles where they fill the device one and a half times, else narrow ones, shared until they fill most
        of it. Best or within 1.5% of the best of 24 cuts for Llama-8B's and Qwen3-0.6B's matrices on an H100.

        large: a core has 100 KiB of shared memory and more; else tiles stay below 64.
        """
        if large and outputs >= 96 * cores and inputs >= 128:
            return Cut(64, 128, 1, 5)
        rows, stages = (32, 4) if large else (16, 2)
        wide = min(256, max(16, _pow2(inputs)))
        tiles, split = -(-outputs // rows), 1
        while 4 * tiles * split < 3 * cores and inputs >= 4 * split * wide and split < 4:
            split *= 2
        return Cut(rows, wide, split, stages)


class Skinny:
    """x [M, I] · weightᵀ [I, O] + bias, rounded, + residual, for one weight's shape.

    Calls on one object must be ordered on one stream: they share the workspace of shared inputs.
    """

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
        self.outputs, self.inputs, self.dtype, self.device = outputs, inputs, dtype, device
        self.early = early_start(device)
        self.cut = cut = Cut.of(outputs, inputs, cores(device), bool(self.early) or interpreted())
        whole = outputs % cut.outputs == 0 and inputs % cut.inputs == 0
        self._columns = -(-outputs // cut.outputs)
        self._parts = self._counters = None
        if cut.split > 1:
            self._parts = torch.empty(cut.split * MAX_ROWS * outputs, dtype=torch.float32, device=device)
            self._counters = torch.zeros(self._columns, dtype=torch.int32, device=device)
        # What the compiler specialises on of these two: shapes of a kind share one compiled kernel.
        self._kind = tuple((size == 1, size % 16 == 0) for size in (outputs, inputs))
        upcast = interpreted() or dtype == torch.float32
        self._plain = cut.outputs, cut.inputs, cut.split, whole, cut.outputs >= 64
        self._rest = upcast, bool(self.early), cut.stages
        self._options: dict[str, Any] = {"num_warps": 4, **self.early}

    def _constants(self, bias: bool, residual: bool) -> tuple[Any, ...]:
        return (*self._plain, bias, residual, *self._rest)

    def compile_ahead(self, bias: bool = False) -> None:
        """Start to compile what calls over a plain weight will need."""
        dtype, floats, ints = self.dtype, torch.float32, torch.int32
        constants = self._constants(bias, False)
        work = (floats, ints) if self.cut.split > 1 else (None, None)
        strides = (self.inputs, self.inputs, 0, self.outputs)
        _SKINNY.compile_ahead(
            (constants, self._kind), self.device,
            (dtype, dtype, dtype if bias else None, None, dtype, *work, 3, self.outputs, self.inputs, *strides,
             *constants), self._options,
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, I] with any row stride, M <= 16 -> [M, O]."""
        if out is None:
            out = torch.empty(x.shape[0], self.outputs, dtype=x.dtype, device=x.device)
        constants = self._constants(bias is not None, residual is not None)
        strides = x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)
        tensors = x, weight, bias, residual, out, self._parts, self._counters
        _SKINNY(
            ((constants, self._kind), strides, signature(*tensors), x.device.index),
            (self._columns, self.cut.split, 1),
            (*tensors, x.shape[0], self.outputs, self.inputs, *strides, *constants), self._options,
        )  # fmt: skip
        return out
