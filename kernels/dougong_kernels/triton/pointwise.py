"""Row-wise kernels: RMS norm, residual add + RMS norm, gated activations, the merge of two partial attentions."""

import triton
import triton.language as tl

from dougong_kernels.triton.early import wait_for_inputs


@triton.jit(do_not_specialize=["eps", "offset"])
def rms_norm_kernel(x, residual, y, total, weight, eps, offset, stride_x, stride_r, stride_y, stride_t,
                    E: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, OFFSET: tl.constexpr,
                    EARLY: tl.constexpr):
    """One program per row. ADD: x + residual is rounded, stored in `total` (which may be `residual`) and normed."""
    wait_for_inputs(EARLY)
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < E
    value = tl.load(x + row * stride_x + i, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(weight + i, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * stride_r + i, mask=ok, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + row * stride_t + i, rounded, mask=ok)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / E + eps)
    if OFFSET:
        out = normed * (offset + w)
    else:
        out = normed.to(dtype).to(tl.float32) * w
    tl.store(y + row * stride_y + i, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def gated_kernel(gate_up, out, stride_g, I: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
                 EARLY: tl.constexpr):
    """act(gate) * up. Grid (rows, ceil(I / BLOCK)); the output [rows, I] is contiguous."""
    wait_for_inputs(EARLY)
    dtype: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < I
    gate = tl.load(gate_up + row * stride_g + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_g + I + column, mask=ok, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh(z) = 1 - 2 / (exp(2z) + 1), right at both infinities
        act = 0.5 * gate * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    else:
        act = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * I + column, (act.to(dtype).to(tl.float32) * up).to(dtype), mask=ok)


@triton.jit
def merge_kernel(a, lse_a, b, lse_b, out, lse, stride_at, stride_ah, stride_bt, stride_bh, stride_la, stride_lb,
                 H: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr):
    """One program per (token, head): weights from the two LSEs; an empty part's values are never used."""
    t = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    i = tl.arange(0, BLOCK)
    ok = i < DV
    la = tl.load(lse_a + t * stride_la + h)
    lb = tl.load(lse_b + t * stride_lb + h)
    top = tl.maximum(la, lb)
    safe = tl.where(top == -float("inf"), 0.0, top)
    wa = tl.exp(la - safe)
    wb = tl.exp(lb - safe)
    total = wa + wb
    share = tl.where(total > 0, total, 1.0)
    pa = tl.load(a + t * stride_at + h * stride_ah + i, mask=i < tl.where(wa > 0, DV, 0), other=0.0).to(tl.float32)
    pb = tl.load(b + t * stride_bt + h * stride_bh + i, mask=i < tl.where(wb > 0, DV, 0), other=0.0).to(tl.float32)
    pa = tl.where(wa > 0, pa * (wa / share), 0.0)
    pb = tl.where(wb > 0, pb * (wb / share), 0.0)
    tl.store(out + (t * H + h) * DV + i, (pa + pb).to(out.dtype.element_ty), mask=ok)
    tl.store(lse + t * H + h, tl.where(total > 0, safe + tl.log(share), -float("inf")))
