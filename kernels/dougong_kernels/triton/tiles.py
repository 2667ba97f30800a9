"""Device functions every attention kernel shares: one K/V tile in, one online-softmax step out.

A tile is `BLOCK_M` query rows by `C = BLOCK_N * HPT` columns. A row is (query token, kv head, head of its group);
a column is (key position, kv head). With `HPT > 1` one tile serves several kv heads: a column of another kv head than
the row's is masked like an invisible key. Decode has H/K rows per kv head and matrix units want 16, so four kv heads
of four query heads fill a tile that one kv head would leave three quarters empty, at the same number of products and
with four times longer contiguous reads.

Scores are kept in base 2 (`log2(e)` folded into the scale), so that `exp2` is the only transcendental.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def to_compute(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """A cache tile as the dot's operand dtype.

    FP8 == 2 decodes e4m3 from raw bytes for targets without the conversion: the byte's 7 low bits are a float16's
    exponent and mantissa moved by 7 places, which leaves the value 2**8 too small, subnormals included. FP8 == 3
    does so for e4m3fnuz, whose exponents count from one less and whose only NaN stands where -0 would.
    """
    # One return: see rotate.quantize.
    if FP8 >= 2:
        b = x.to(tl.int16)
        half = (((b & 0x7F) << 7) | ((b & 0x80) << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        if FP8 == 3:
            out = tl.where(b == 0x80, float("nan"), half * 128.0).to(dtype)
        else:
            out = (half * 256.0).to(dtype)
    else:
        out = x.to(dtype)
    return out


@triton.jit
def place_in_plane(dim, PACK: tl.constexpr, PAGE: tl.constexpr):
    """How far an element of a head lies from the head's first. PACK 0: that many elements. Else PACK elements lie
    together and the next PACK of them PAGE tokens on: "h d/8 n 8" (PACK 8), "h d n" (PACK 1)."""
    if PACK > 0:
        at = (dim // PACK) * (PAGE * PACK) + dim % PACK
    else:
        at = dim
    return at


@triton.jit
def tanh(x):
    """Within 3 units in the last place of float32 everywhere: by its series' minimax polynomial near 0, where
    1 - 2 / (e^2x + 1) would lose the digits that the subtraction cancels, and by that beyond."""
    z = x * x
    near = 0.0017158274688289247 * z - 0.007619337659883709
    near = near * z + 0.021425964396002667
    near = near * z - 0.05388418428586941
    near = near * z + 0.13332559755067988
    near = near * z - 0.33333306281322733
    near = (near * z + 0.999999998436856) * x
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(z < 0.5625, near, far)


@triton.jit
def visible_range(pos_first, pos_last, kv_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Half-open range of key positions that any query in pos_first..pos_last may see; empty is (x, <= x).

    WINDOW: a query sees keys nearer than `window`, which is read at run time, so that layers of all windows share one
    compiled kernel.
    """
    lo = 0
    hi = kv_len
    if CAUSAL:
        hi = tl.minimum(hi, pos_last + 1)
    if WINDOW:
        lo = tl.maximum(pos_first - window + 1, 0)
        if not CAUSAL:
            hi = tl.minimum(hi, pos_last + window)
    return lo, tl.maximum(hi, lo)


@triton.jit
def load_tile(base, stride_b, stride_n, stride_h, block, place, head, offs_d, mask_c,
              DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr, PACK: tl.constexpr, PAGE: tl.constexpr):
    """[C, PAD] elements of the cache; masked columns and padded dims read 0 and touch no memory."""
    rows = base + block.to(tl.int64) * stride_b + place * stride_n + head * stride_h
    ptr = rows[:, None] + place_in_plane(offs_d, PACK, PAGE)[None, :]
    if DIM != PAD:
        if MASKED:
            return tl.load(ptr, mask=mask_c[:, None] & (offs_d[None, :] < DIM), other=0.0)
        else:
            return tl.load(ptr, mask=offs_d[None, :] < DIM, other=0.0)
    else:
        if MASKED:
            return tl.load(ptr, mask=mask_c[:, None], other=0.0)
        else:
            return tl.load(ptr)


@triton.jit
def attend(q, q_rope, m, l, acc, k, v, table_row, tile_first, tile_last, lo, hi,
           row_pos, row_head, slope, scale, softcap, window,
           stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, kv_head,
           MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
           ALIBI: tl.constexpr, FP8: tl.constexpr, UPCAST: tl.constexpr,
           LATENT: tl.constexpr, SAME: tl.constexpr, HPT: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
           D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, DR: tl.constexpr,
           PACK_K: tl.constexpr, PACK_V: tl.constexpr, STAGES: tl.constexpr):
    """Run tiles tile_first..tile_last-1 through the online softmax; returns (m, l, acc).

    table_row: pointer to the row's block table, or with PAGE == 0 the row's first key in a ragged K and V.

    MASKED False promises that every row sees every key of these tiles, that none is past `hi`, and HPT == 1.
    LATENT: V is the first DV elements of K, so one load serves both; K's remaining DR elements (the rope part) are a
    second, narrow product. SAME: K and V have the same strides, so that one set of offsets serves both.
    """
    if SAME:
        stride_vb = stride_kb
        stride_vn = stride_kn
        stride_vh = stride_kh
    C: tl.constexpr = BLOCK_N * HPT
    cols = tl.arange(0, C)
    offs_d = tl.arange(0, DP)
    offs_v = tl.arange(0, DVP)
    if HPT > 1:
        col_head = cols % HPT
        col_n = cols // HPT
        head = kv_head + col_head
    else:
        col_n = cols
        head = kv_head
    dtype: tl.constexpr = tl.float32 if UPCAST else q.dtype
    for tile in tl.range(tile_first, tile_last, num_stages=STAGES):
        key = tile * BLOCK_N + col_n
        visible = (key < hi) & (key >= lo)
        if PAGE == 0:
            # No pages: the row's keys lie one after another, and stride_kb is a key's stride.
            block = table_row + key
            place = 0
        else:
            if MASKED:
                block = tl.load(table_row + key // PAGE, mask=visible, other=0)
            else:
                block = tl.load(table_row + key // PAGE)
            place = key % PAGE
        kt = load_tile(k, stride_kb, stride_kn, stride_kh, block, place, head, offs_d, visible, D, DP, MASKED, PACK_K,
                       PAGE)
        kc = to_compute(kt, dtype, FP8)
        s = tl.dot(q, tl.trans(kc), input_precision="ieee")
        if DR > 0:
            rope = load_tile(k + DP, stride_kb, stride_kn, stride_kh, block, place, head, tl.arange(0, DR), visible,
                             DR, DR, MASKED, 0, PAGE)
            s = tl.dot(q_rope, tl.trans(to_compute(rope, dtype, FP8)), s, input_precision="ieee")
        if LATENT:
            vc = kc
        else:
            vt = load_tile(v, stride_vb, stride_vn, stride_vh, block, place, head, offs_v, visible, DV, DVP, MASKED,
                           PACK_V, PAGE)
            vc = to_compute(vt, dtype, FP8)
        if (MASKED or SOFTCAP) or ALIBI:  # Triton 3.3 takes no chain of three
            if SOFTCAP:
                s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
            else:
                s = s * (scale * LOG2E)
            if ALIBI:
                s += slope[:, None] * (key[None, :] - row_pos[:, None]).to(tl.float32)
            if MASKED:
                see = visible[None, :]
                if CAUSAL:
                    see = see & (key[None, :] <= row_pos[:, None])
                if WINDOW:
                    see = see & (key[None, :] > row_pos[:, None] - window)
                    if not CAUSAL:
                        see = see & (key[None, :] < row_pos[:, None] + window)
                if HPT > 1:
                    see = see & (col_head[None, :] == row_head[:, None])
                s = tl.where(see, s, -float("inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                # A row that has seen nothing keeps m = -inf; 0 in its place keeps exp2 from making NaN of inf - inf.
                base = tl.where(m_new == -float("inf"), 0.0, m_new)
            else:
                m_new = tl.maximum(m, tl.max(s, 1))
                base = m_new
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(m - base)
        else:
            # scale >= 0, so the largest score scales to the largest; the multiply and subtract become one FMA.
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
            p = tl.exp2(s * (scale * LOG2E) - m_new[:, None])
            alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(dtype), vc, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def load_q(q, token, head, stride_t, stride_h, offs, mask_m, DIM: tl.constexpr, PAD: tl.constexpr,
           UPCAST: tl.constexpr):
    """[M, PAD] query rows, zeros where masked or padded."""
    ptr = q + token.to(tl.int64)[:, None] * stride_t + head[:, None] * stride_h + offs[None, :]
    mask = mask_m[:, None]
    if DIM != PAD:
        mask = mask & (offs[None, :] < DIM)
    x = tl.load(ptr, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def finish(out, lse, sinks, v_scale, m, l, acc, token, head, mask_m, stride_ot, stride_oh, stride_lt,
           SINKS: tl.constexpr, LSE: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """Divide, scale V, add the sink to the denominator once, store out and the natural-log LSE (never the sink)."""
    offs_v = tl.arange(0, DVP)
    empty = m == -float("inf")
    if LSE:
        value = tl.where(empty, -float("inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * LN2)
        tl.store(lse + token.to(tl.int64) * stride_lt + head, value, mask=mask_m)
    total = l
    if SINKS:
        sink = tl.load(sinks + head, mask=mask_m, other=0.0).to(tl.float32) * LOG2E
        # The sink may dominate the denominator: rescale both to the larger exponent.
        top = tl.maximum(m, sink)
        shrink = tl.where(empty, 0.0, tl.exp2(m - top))
        total = l * shrink + tl.exp2(sink - top)
        acc = acc * shrink[:, None]
    total = tl.where(empty, 1.0, total)
    o = tl.where(empty[:, None], 0.0, acc * (v_scale / total)[:, None])
    ptr = out + token.to(tl.int64)[:, None] * stride_ot + head[:, None] * stride_oh + offs_v[None, :]
    mask = mask_m[:, None]
    if DV != DVP:
        mask = mask & (offs_v[None, :] < DV)
    tl.store(ptr, o.to(out.dtype.element_ty), mask=mask)
