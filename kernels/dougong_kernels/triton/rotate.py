"""QK norm, rope and the cache write in one launch; each part can be left out."""

import triton
import triton.language as tl

from dougong_kernels.triton.early import wait_for_inputs
from dougong_kernels.triton.tiles import place_in_plane

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to |x| < 2**22 leaves x rounded to an integer, ties to even


@triton.jit
def quantize(x, scale, KIND: tl.constexpr):
    """float32 -> the cache's element. KIND 0: no change; 1: int8; 2 and 3: e4m3 and e4m3fnuz as a
    byte. Saturates, rounds ties to even."""
    # One return: the compiler visits what follows a return in a branch, and then finds two types.
    if KIND == 0:
        out = x
    else:
        y = tl.div_rn(x, scale)
        if KIND == 1:
            y = tl.minimum(tl.maximum(y, -127.0), 127.0)
            out = ((y + _ROUND) - _ROUND).to(tl.int8)
        else:
            # fnuz counts exponents from one less, so its largest, its smallest and its step are half of the other's.
            FNUZ: tl.constexpr = KIND == 3
            bad = y != y
            a = tl.minimum(tl.abs(y), 240.0 if FNUZ else 448.0)
            bits = a.to(tl.int32, bitcast=True)
            normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (952 if FNUZ else 960)
            small = ((a * (1024.0 if FNUZ else 512.0) + _ROUND) - _ROUND).to(tl.int32)
            code = tl.where(a < (0.0078125 if FNUZ else 0.015625), small, normal)
            sign = (y.to(tl.int32, bitcast=True) >> 24) & 0x80
            if FNUZ:  # no -0: its code is the NaN
                code = tl.where(bad, 0x80, tl.where(code == 0, 0, code | sign))
            else:
                code = tl.where(bad, 0x7F, code) | sign
            out = code.to(tl.uint8)
    return out


@triton.jit
def _norm(x, mean_square, weight, offset, eps, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """x float32 with its row's mean of squares -> normed and rounded as the reference op rounds, float32 again."""
    y = x * tl.rsqrt(mean_square + eps)[:, None]
    if OFFSET:
        return (y * (offset + weight.to(tl.float32))[None, :]).to(dtype).to(tl.float32)
    y = y.to(dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    return y.to(dtype).to(tl.float32)


@triton.jit
def _heads(src, dst, stride_sh, stride_dh, weight, cos_sin, scale, offset, eps, first, count,
           D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
           NORM: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, KIND: tl.constexpr, PACK: tl.constexpr,
           PAGE: tl.constexpr):
    """Heads first … first+HEADS-1 of one token: read at src, norm, rotate, store at dst, packed as
    ``place_in_plane`` says."""
    dtype: tl.constexpr = src.dtype.element_ty
    h = first + tl.arange(0, HEADS)
    ok = (h < count)[:, None]
    total = tl.zeros([HEADS], tl.float32)
    if R > 0:
        i = tl.arange(0, HALF)
        in_half = i < R // 2
        if INTERLEAVED:
            at_a = 2 * i
            at_b = 2 * i + 1
        else:
            at_a = i
            at_b = i + R // 2
        rot = ok & in_half[None, :]
        a = tl.load(src + h[:, None] * stride_sh + at_a[None, :], mask=rot, other=0.0).to(tl.float32)
        b = tl.load(src + h[:, None] * stride_sh + at_b[None, :], mask=rot, other=0.0).to(tl.float32)
        total += tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if REST > 0:
        j = R + tl.arange(0, REST)
        keep = ok & (j < D)[None, :]
        c = tl.load(src + h[:, None] * stride_sh + j[None, :], mask=keep, other=0.0).to(tl.float32)
        total += tl.sum(c * c, 1)
    total = total / D
    if R > 0:
        if NORM:
            a = _norm(a, total, tl.load(weight + at_a, mask=in_half, other=0.0), offset, eps, OFFSET, dtype)
            b = _norm(b, total, tl.load(weight + at_b, mask=in_half, other=0.0), offset, eps, OFFSET, dtype)
        cos = tl.load(cos_sin + i, mask=in_half, other=0.0)[None, :]
        sin = tl.load(cos_sin + R // 2 + i, mask=in_half, other=0.0)[None, :]
        x = (a * cos - b * sin).to(dtype).to(tl.float32)
        y = (b * cos + a * sin).to(dtype).to(tl.float32)
        to = dst + h[:, None] * stride_dh
        tl.store(to + place_in_plane(at_a, PACK, PAGE)[None, :],
                 quantize(x, scale, KIND).to(dst.dtype.element_ty), mask=rot)
        tl.store(to + place_in_plane(at_b, PACK, PAGE)[None, :],
                 quantize(y, scale, KIND).to(dst.dtype.element_ty), mask=rot)
    if REST > 0:
        if NORM:
            c = _norm(c, total, tl.load(weight + j, mask=j < D, other=0.0), offset, eps, OFFSET, dtype)
        tl.store(dst + h[:, None] * stride_dh + place_in_plane(j, PACK, PAGE)[None, :],
                 quantize(c, scale, KIND).to(dst.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["offset", "eps"])
def rotate_write_kernel(q, k, v, q_out, k_cache, v_cache, slots, positions, cos_sin, q_norm, k_norm, k_scale, v_scale,
                        offset, eps, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                        stride_ot, stride_oh, stride_cb, stride_cn, stride_ch, stride_wb, stride_wn, stride_wh,
                        stride_p,
                        H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
                        HALF: tl.constexpr, REST: tl.constexpr, RESTV: tl.constexpr, HEADS: tl.constexpr,
                        PAGE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, OFFSET: tl.constexpr,
                        INTERLEAVED: tl.constexpr, KIND: tl.constexpr, SCALES: tl.constexpr, WRITE: tl.constexpr,
                        WRITE_V: tl.constexpr, PACK_K: tl.constexpr, PACK_V: tl.constexpr, EARLY: tl.constexpr):
    """Grid (tokens, ceil(H/HEADS) + (WRITE ? ceil(K/HEADS) : 0) + (WRITE_V ? ceil(K/HEADS) : 0)).

    Query blocks norm and rotate q into q_out (which may be q); key blocks do so into the cache; value blocks copy.
    """
    wait_for_inputs(EARLY)
    QB: tl.constexpr = (H + HEADS - 1) // HEADS
    KB: tl.constexpr = (K + HEADS - 1) // HEADS
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1)
    if R > 0:
        row = cos_sin + tl.load(positions + t) * stride_p
    else:
        row = cos_sin
    if b < QB:
        _heads(q + t * stride_qt, q_out + t * stride_ot, stride_qh, stride_oh, q_norm, row, 1.0, offset, eps,
               b * HEADS, H, D, R, HALF, REST, HEADS, Q_NORM, OFFSET, INTERLEAVED, 0, 0, PAGE)
    elif WRITE:
        slot = tl.load(slots + t)
        block = slot // PAGE
        place = slot % PAGE
        if b < QB + KB:
            scale = k_scale
            if SCALES:
                scale = tl.load(k_scale)
            _heads(k + t * stride_kt, k_cache + block * stride_cb + place * stride_cn, stride_kh, stride_ch,
                   k_norm, row, scale, offset, eps, (b - QB) * HEADS, K, D, R, HALF, REST, HEADS, K_NORM, OFFSET,
                   INTERLEAVED, KIND, PACK_K, PAGE)
        elif WRITE_V:
            scale_v = v_scale
            if SCALES:
                scale_v = tl.load(v_scale)
            _heads(v + t * stride_vt, v_cache + block * stride_wb + place * stride_wn, stride_vh, stride_wh,
                   k_norm, row, scale_v, offset, eps, (b - QB - KB) * HEADS, K, DV, 0, 0, RESTV, HEADS, False, False,
                   False, KIND, PACK_V, PAGE)
