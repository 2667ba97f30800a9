"""Matrix products for a few rows (decode of few sequences), where the time is that of reading the weight once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dougong.hal import Device, LinearKernel, LinearQuery, QuantizedWeight, Refusal
from dougong_kernels.ops.skinny import MAX_ROWS, Skinny
from dougong_kernels.target import available, early_start, interpreted
from dougong_kernels.triton.skinny import gemv_kernel

__all__ = ["MAX_FUSED_ROWS", "MAX_ROWS", "TritonLinear", "linear"]

MAX_FUSED_ROWS = 4
"""Rows up to which a prologue may be fused."""
_PROLOGUES = {None: 0, "rms_norm": 1, "silu_mul": 2, "gelu_tanh_mul": 3}


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    prologue: str | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """prologue(x) · weightᵀ + bias, rounded, + residual. x [M, I], M <= 16; weight [O, I]; residual [M, O].

    The kernel enqueued just before must not write ``weight``: on a device where kernels begin early it may not be seen.

    prologue (M <= 4): "rms_norm" with ``norm`` [I]; "silu_mul" or "gelu_tanh_mul" with x [M, 2I].
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if rows > MAX_ROWS or (prologue is not None and rows > MAX_FUSED_ROWS):
        raise ValueError(f"{rows} rows (prologue {prologue}): at most {MAX_ROWS}, {MAX_FUSED_ROWS} with a prologue")
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    stride_r = 0 if residual is None else residual.stride(0)
    flags: dict[str, Any] = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    if rows <= MAX_FUSED_ROWS:
        block_i = min(_pow2(inputs), 4096)
        # 8 Ki elements per program: 16 KiB of weight in flight in each of several programs on a core.
        block_o = max(1, min(16, 8192 // block_i, _pow2(outputs)))
        early = early_start(x.device)
        gemv_kernel[(-(-outputs // block_o),)](
            x, weight, bias, residual, norm, out, outputs, eps, offset, x.stride(0), weight.stride(0), stride_r,
            out.stride(0), I=inputs, M=rows, BLOCK_O=block_o, BLOCK_I=block_i, PROLOGUE=_PROLOGUES[prologue],
            OFFSET=offset != 0, EARLY=bool(early), num_warps=4, **flags, **early,
        )  # fmt: skip
        return out
    return Skinny(outputs, inputs, x.dtype, x.device)(x, weight, bias, residual, out)


class TritonLinear(LinearKernel):
    """Dense products: lane by lane for one row, on the matrix units for 2 to 16, torch's library otherwise.

    Measured on an H100 in a graph. One row: 5 to 32% faster than torch's library for up to 8,192 inputs, slower beyond
    (14,336 inputs: 45.5 against 43.6 us). 16 rows: even to 16% faster, and a whole step of
    Llama-8B's by 3%, since all its kernels begin early; where kernels cannot, the library is as fast and is used.
    """

    inputs = 8192
    """Most inputs of a one-row product."""

    @classmethod
    def supports(cls, query: LinearQuery, device: Device) -> tuple[Refusal, ...]:
        refusals = []
        missing = available(torch.device(device.torch_device))
        if missing:
            refusals.append(Refusal(missing))
        if query.format != "dense":
            refusals.append(Refusal(f"format {query.format}", "dense"))
        if query.dtype not in (torch.bfloat16, torch.float16):
            refusals.append(Refusal(f"dtype {query.dtype}", "bfloat16 or float16"))
        return tuple(refusals)

    def __init__(self, query: LinearQuery, device: Device) -> None:
        super().__init__(query, device)
        where = torch.device(device.torch_device)
        self.skinny: Skinny | None = None
        if early_start(where) or interpreted():
            self.skinny = Skinny(query.out_features, query.in_features, query.dtype, where)

    def prepare(self, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
        assert isinstance(weight, torch.Tensor)
        if self.skinny is not None:
            self.skinny.compile_ahead()
        return weight.to(device=self.device.torch_device, dtype=self.query.dtype).contiguous()

    def apply(self, x: torch.Tensor, packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        one = rows == 1 and self.query.in_features <= self.inputs
        few = 1 < rows <= MAX_ROWS and self.skinny is not None
        if not one and not few:
            return F.linear(x, packed, bias)
        flat = x.reshape(rows, x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        if one:
            out = linear(flat, packed, bias)
        else:
            assert self.skinny is not None
            out = self.skinny(flat, packed, bias)
        return out.view(*x.shape[:-1], packed.shape[0])

    def unpack(self, packed: Any) -> torch.Tensor:
        return packed  # type: ignore[no-any-return]
