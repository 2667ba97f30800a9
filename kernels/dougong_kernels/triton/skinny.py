"""y = prologue(x) · Wᵀ + bias + residual for a few rows of x: W read once, all of it in flight together.

`gemv_kernel` holds up to four rows of x in registers and multiplies lane by lane. Its prologue can be an RMS norm or a
gated activation, recomputed by every program: x is some kilobytes out of L2, a launch is microseconds.
`skinny_kernel` takes up to 16 rows to the matrix units.

Weights are there before any kernel of a step runs: `gemv_kernel` with one chunk, begun early, reads them before it
waits for x.
"""

import triton
import triton.language as tl

from dougong_kernels.triton.early import wait_for_inputs

NONE = tl.constexpr(0)
NORM = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)


@triton.jit
def _activate(gate, GELU_TANH: tl.constexpr):
    if GELU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    return gate / (1.0 + tl.exp(-gate))


@triton.jit(do_not_specialize=["O", "eps", "offset"])
def gemv_kernel(x, w, bias, residual, norm, y, O, eps, offset, stride_x, stride_w, stride_r, stride_y,
                I: tl.constexpr, M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PROLOGUE: tl.constexpr,
                OFFSET: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr):
    """Grid: ceil(O / BLOCK_O). With BLOCK_I >= I there is one chunk: W's loads are issued before x is there."""
    dtype: tl.constexpr = x.dtype.element_ty
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < O
    i = tl.arange(0, BLOCK_I)
    rows = w + o.to(tl.int64)[:, None] * stride_w
    if BLOCK_I >= I:
        tile = tl.load(rows + i[None, :], mask=o_ok[:, None] & (i < I)[None, :], other=0.0)
        wait_for_inputs(EARLY)
        for m in tl.static_range(M):
            v = tl.load(x + m * stride_x + i, mask=i < I, other=0.0).to(tl.float32)
            if PROLOGUE == NORM:
                weight = tl.load(norm + i, mask=i < I, other=0.0).to(tl.float32)
                v = v * tl.rsqrt(tl.sum(v * v, 0) / I + eps)
                if OFFSET:
                    v = (v * (offset + weight)).to(dtype).to(tl.float32)
                else:
                    v = (v.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
            elif PROLOGUE != NONE:
                up = tl.load(x + m * stride_x + I + i, mask=i < I, other=0.0).to(tl.float32)
                v = (_activate(v, PROLOGUE == GELU).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
            out = tl.sum(tile.to(tl.float32) * v[None, :], 1)
            if BIAS:
                out += tl.load(bias + o, mask=o_ok, other=0.0).to(tl.float32)
            if RESIDUAL:
                # The product is rounded before it is added, as without fusion.
                out = out.to(dtype).to(tl.float32)
                out += tl.load(residual + m * stride_r + o, mask=o_ok, other=0.0).to(tl.float32)
            tl.store(y + m * stride_y + o, out.to(dtype), mask=o_ok)
    else:
        wait_for_inputs(EARLY)
        for m in tl.static_range(M):
            acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
            rstd = 1.0
            if PROLOGUE == NORM:
                square = tl.zeros([BLOCK_I], tl.float32)
                for first in range(0, I, BLOCK_I):
                    v = tl.load(x + m * stride_x + first + i, mask=first + i < I, other=0.0).to(tl.float32)
                    square += v * v
                rstd = tl.rsqrt(tl.sum(square, 0) / I + eps)
            for first in range(0, I, BLOCK_I):
                k = first + i
                ok = k < I
                tile = tl.load(rows + k[None, :], mask=o_ok[:, None] & ok[None, :], other=0.0)
                v = tl.load(x + m * stride_x + k, mask=ok, other=0.0).to(tl.float32)
                if PROLOGUE == NORM:
                    weight = tl.load(norm + k, mask=ok, other=0.0).to(tl.float32)
                    if OFFSET:
                        v = (v * rstd * (offset + weight)).to(dtype).to(tl.float32)
                    else:
                        v = ((v * rstd).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
                elif PROLOGUE != NONE:
                    up = tl.load(x + m * stride_x + I + k, mask=ok, other=0.0).to(tl.float32)
                    v = (_activate(v, PROLOGUE == GELU).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
                acc += tile.to(tl.float32) * v[None, :]
            out = tl.sum(acc, 1)
            if BIAS:
                out += tl.load(bias + o, mask=o_ok, other=0.0).to(tl.float32)
            if RESIDUAL:
                out = out.to(dtype).to(tl.float32)
                out += tl.load(residual + m * stride_r + o, mask=o_ok, other=0.0).to(tl.float32)
            tl.store(y + m * stride_y + o, out.to(dtype), mask=o_ok)


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(x, w, bias, residual, y, parts, counters, M, O, I, stride_x, stride_w, stride_r, stride_y,
                  BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
                  WEIGHT_LEFT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
                  EARLY: tl.constexpr, STAGES: tl.constexpr):
    """Grid (ceil(O / BLOCK_O), SPLIT); M <= 16 rows of x.

    SPLIT > 1: as many programs share the inputs of the same outputs. Each leaves its part, [16, O] float32, in `parts`
    [SPLIT, 16, O]; the last to come, by `counters`, adds them in their order. WHOLE: O and I are multiples of the
    blocks. WEIGHT_LEFT: y is computed transposed, with the weight where Hopper's matrix units want 64 rows or more.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    column = tl.program_id(0)
    part = tl.program_id(1)
    o = column * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.arange(0, 16)
    i = tl.arange(0, BLOCK_I)
    o_ok = o < O
    m_ok = m < M
    share = ((I + BLOCK_I - 1) // BLOCK_I // SPLIT) * BLOCK_I
    begin = part * share
    end = begin + share
    if part == SPLIT - 1:
        end = I
    w_rows = w + o.to(tl.int64)[:, None] * stride_w
    x_rows = x + m[:, None] * stride_x
    wait_for_inputs(EARLY)
    if WEIGHT_LEFT:
        acc = tl.zeros([BLOCK_O, 16], tl.float32)
    else:
        acc = tl.zeros([16, BLOCK_O], tl.float32)
    for first in tl.range(begin, end, BLOCK_I, num_stages=STAGES):
        k = first + i
        if WHOLE:
            a = tl.load(x_rows + k[None, :], mask=m_ok[:, None], other=0.0)
            b = tl.load(w_rows + k[None, :])
        else:
            a = tl.load(x_rows + k[None, :], mask=m_ok[:, None] & (k < I)[None, :], other=0.0)
            b = tl.load(w_rows + k[None, :], mask=o_ok[:, None] & (k < I)[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if WEIGHT_LEFT:
            acc = tl.dot(b, tl.trans(a), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if WEIGHT_LEFT:
        acc = tl.trans(acc)
    ok = m_ok[:, None] & o_ok[None, :]
    last = True
    if SPLIT > 1:
        place = parts + m[:, None] * O + o[None, :]
        tl.store(place + part * 16 * O, acc, mask=ok)
        # Every thread's part is stored before this program counts as arrived.
        tl.debug_barrier()
        last = tl.atomic_add(counters + column, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        if SPLIT > 1:
            tl.store(counters + column, 0)
            acc = tl.zeros([16, BLOCK_O], tl.float32)
            for one in tl.static_range(SPLIT):
                acc += tl.load(place + one * 16 * O, mask=ok, other=0.0, cache_modifier=".cg")
        if BIAS:
            acc += tl.load(bias + o, mask=o_ok, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            acc = acc.to(dtype).to(tl.float32)
            acc += tl.load(residual + m[:, None] * stride_r + o[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(y + m[:, None] * stride_y + o[None, :], acc.to(dtype), mask=ok)
