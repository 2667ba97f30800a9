"""Choosing tokens: Gumbel-max over rows of logits, with top-k, top-p and min-p as one threshold and no sort.

What top-k, top-p and min-p keep is always "every logit not below some value", so each is a search for that value. The
search runs over the bits of the logits (as integers that order like the floats), eight candidates per pass over a row,
three bits per pass. Random numbers are a hash of (seed, position, token): a row draws the same in any batch.
"""

import triton
import triton.language as tl

_A = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15
_B = tl.constexpr(-4658895280553007687)  # 0xBF58476D1CE4E5B9
_C = tl.constexpr(-7723592293110705685)  # 0x94D049BB133111EB


@triton.jit
def _mix(x):
    """splitmix64's finaliser on int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _B
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _C
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _minus_log(u):
    """-log(u), u in (0, 1], to float32's relative precision near 1 too, where the hardware's log has none left."""
    z = (u - 1.0) / (u + 1.0)
    w = z * z
    near = z * (2.0 + w * (0.6666666667 + w * (0.4 + w * (0.2857142857 + w * (0.2222222222 + w * (
        0.1818181818 + w * (0.1538461538 + w * 0.1333333333)))))))
    return tl.where(u > 0.5, -near, -tl.log(u))


@triton.jit
def _gumbel(seed, position, token):
    row = _mix(seed + _mix(position * _A))
    bits = _mix(row + token * _A)
    # 23 bits and a half: exact in float32, never 0 and never 1
    u = (((bits >> 41) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(_minus_log(u))


@triton.jit
def _ordered(x):
    """float32 -> int32 that orders alike."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _pack(x, token):
    """(value, token) -> int64 whose maximum is the largest value and, among equals, the lowest token."""
    return (_ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit(do_not_specialize=["V"])
def choose_kernel(logits, temperature, threshold, seeds, positions, partial, counters, out, V, stride_l,
                  PARTS: tl.constexpr, PARTS_P: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Grid (R, PARTS): each program takes a part of a row; the last one to finish a row picks its token.

    Rows of temperature <= 0 take the arg max. threshold [R]: scaled logits below it are out (MASKED).
    """
    r = tl.program_id(0)
    part = tl.program_id(1)
    heat = tl.load(temperature + r)
    seed = tl.load(seeds + r)
    position = tl.load(positions + r)
    if MASKED:
        floor = tl.load(threshold + r)
    size = (V + PARTS - 1) // PARTS
    first = part * size
    last = tl.minimum(first + size, V)
    base = logits + r.to(tl.int64) * stride_l
    best = tl.full([BLOCK], -9223372036854775807, tl.int64)
    for at in range(first, last, BLOCK):
        token = at + tl.arange(0, BLOCK)
        ok = token < last
        x = tl.load(base + token, mask=ok, other=-float("inf")).to(tl.float32)
        if heat > 0:
            x = tl.div_rn(x, heat)
            noise = _gumbel(seed, position, token.to(tl.int64))
            if MASKED:
                x = tl.where(x >= floor, x + noise, -float("inf"))
            else:
                x = x + noise
        best = tl.maximum(best, tl.where(ok, _pack(x, token), -9223372036854775807))
    top = tl.max(best, 0)
    if PARTS == 1:
        tl.store(out + r, (0x7FFFFFFF - (top & 0x7FFFFFFF)))
    else:
        tl.store(partial + r * PARTS + part, top)
        tl.debug_barrier()
        if tl.atomic_add(counters + r, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.store(counters + r, 0)
            i = tl.arange(0, PARTS_P)
            every = tl.load(partial + r * PARTS + i, mask=i < PARTS, other=-9223372036854775807, cache_modifier=".cg")
            tl.store(out + r, 0x7FFFFFFF - (tl.max(every, 0) & 0x7FFFFFFF))


@triton.jit
def _unordered(key):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _search(base, V, peak, rate, floor, want, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest ordered key t such that the keys >= max(t, floor) number, or weigh, at least `want`.

    Each pass tries eight keys and fixes three bits. Sums stay in registers until the end of a pass.
    """
    steps = tl.arange(0, 8)
    found = -2147483648
    for level in range(11):
        step = 1 << tl.maximum(29 - 3 * level, 0)
        trial = found + steps * step
        if MASS:
            total = tl.zeros([BLOCK, 8], tl.float32)
        else:
            total = tl.zeros([BLOCK, 8], tl.int32)
        for at in range(0, V, BLOCK):
            token = at + tl.arange(0, BLOCK)
            x = tl.load(base + token, mask=token < V, other=-float("inf")).to(tl.float32)
            key = _ordered(x)
            reached = key[:, None] >= trial[None, :]
            if MASS:
                weight = tl.where(key >= floor, tl.exp2((x - peak) * rate), 0.0)
                total += tl.where(reached, weight[:, None], 0.0)
            else:
                total += reached.to(tl.int32)
        good = tl.sum(total, 0) >= want
        found += tl.max(tl.where(good, steps, 0), 0) * step
    return found


@triton.jit(do_not_specialize=["V"])
def threshold_kernel(logits, temperature, top_k, top_p, min_p, out, V, stride_l,
                     TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: the value below which top-k, then top-p, then min-p leave a scaled logit out.

    The k-th largest value is the largest t with count(x >= t) >= k. Top-p keeps x where the mass above it is below p:
    its edge is the largest t with mass(x >= t) >= p. The search is among the unscaled logits, which order alike.
    """
    r = tl.program_id(0)
    heat = tl.load(temperature + r)
    base = logits + r.to(tl.int64) * stride_l
    value = -float("inf")
    if heat > 0:
        high = tl.full([BLOCK], -float("inf"), tl.float32)
        for at in range(0, V, BLOCK):
            token = at + tl.arange(0, BLOCK)
            high = tl.maximum(high, tl.load(base + token, mask=token < V, other=-float("inf")).to(tl.float32))
        peak = tl.max(high, 0)
        rate = 1.4426950408889634 / heat
        edge = -2147483648
        if TOP_K:
            k = tl.load(top_k + r).to(tl.int32)
            if (k > 0) & (k < V):
                edge = _search(base, V, peak, rate, edge, k, False, BLOCK)
        if TOP_P:
            p = tl.load(top_p + r)
            if p < 1.0:
                mass = tl.zeros([BLOCK], tl.float32)
                for at in range(0, V, BLOCK):
                    token = at + tl.arange(0, BLOCK)
                    x = tl.load(base + token, mask=token < V, other=-float("inf")).to(tl.float32)
                    mass += tl.where(_ordered(x) >= edge, tl.exp2((x - peak) * rate), 0.0)
                found = _search(base, V, peak, rate, edge, p * tl.sum(mass, 0), True, BLOCK)
                # The most likely token always stays, also for p = 0.
                edge = tl.maximum(edge, tl.minimum(found, _ordered(peak)))
        # -inf is the smallest key of a number: below it nothing was left out.
        if edge > _ordered(value):
            bits = tl.where(edge < 0, edge ^ 0x7FFFFFFF, edge)
            value = tl.div_rn(bits.to(tl.float32, bitcast=True), heat)
        if MIN_P:
            share = tl.load(min_p + r)
            if share > 0:
                value = tl.maximum(value, tl.div_rn(peak, heat) + tl.log(share))
    tl.store(out + r, value)
