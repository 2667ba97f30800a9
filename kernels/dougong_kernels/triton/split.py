"""Split-KV attention for rows of few queries (decode, draft verification): memory-bound, so balanced to the tile.

All (row, head group, key tile) triples form one line, cut into equal shares for a persistent grid: every program reads
the same number of keys whatever the lengths are. A program's first and last segment may be parts of a (row, head
group); such parts go to a workspace, and the program that finishes a (row, head group) last merges its parts, in their
order, so that the result does not depend on who was last. With FIXED every segment is one unit of constant size
counted from the row's start: a row is then cut the same way whatever shares its batch (batch-invariant).
"""

import triton
import triton.language as tl

from dougong_kernels.triton.early import wait_for_inputs
from dougong_kernels.triton.planning import SHARE, TABLE, TOTAL, WIDTH
from dougong_kernels.triton.tiles import LOG2E, attend, finish, load_q, visible_range


@triton.jit
def _merge(ws_acc, ws_lse, first, step, parts, offs_r, ok, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
           DVP: tl.constexpr, AT_ONCE: tl.constexpr):
    """Merge parts at slots first, first + 1, first + 1 + step, … ; returns (m, l, acc) as attend does.

    AT_ONCE parts are read before the first is used: one after another, the way to L2 and back would be paid for each.
    """
    offs_v = tl.arange(0, DVP)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    for begin in range(0, parts, AT_ONCE):
        lses = ()
        accs = ()
        for u in tl.static_range(AT_ONCE):
            i = begin + u
            here = ok & (i < parts)
            slot = tl.where(i == 0, first, first + 1 + (i - 1) * step).to(tl.int64)
            lses += (tl.load(ws_lse + slot * ROWS + offs_r, mask=here, other=-float("inf"), cache_modifier=".cg"),)
            accs += (tl.load(ws_acc + (slot * ROWS + offs_r)[:, None] * DVP + offs_v[None, :], mask=here[:, None],
                             other=0.0, cache_modifier=".cg"),)
        for u in tl.static_range(AT_ONCE):
            m_new = tl.maximum(m, lses[u])
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
            old = tl.exp2(m - base)
            new = tl.exp2(lses[u] - base)
            l = l * old + new
            acc = acc * old[:, None] + accs[u] * new[:, None]
            m = m_new
    return m, l, acc


@triton.jit(do_not_specialize=["window"])
def split_kernel(q, k, v, out, lse, head, prefix, starts, rows, kv_start, ws_acc, ws_lse, counters,
                 k_scale, v_scale, sinks, slopes, scale, softcap, window,
                 stride_qt, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                 stride_ot, stride_oh, stride_lt,
                 unit_tiles: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, HPT: tl.constexpr,
                 BLOCK_M: tl.constexpr, QT: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
                 D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
                 CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
                 SINKS: tl.constexpr, SCALES: tl.constexpr, LSE: tl.constexpr, FP8: tl.constexpr,
                 UPCAST: tl.constexpr, LATENT: tl.constexpr, SAME: tl.constexpr, FIXED: tl.constexpr,
                 PACK_K: tl.constexpr, PACK_V: tl.constexpr,
                 AT_ONCE: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    """One program of the persistent grid. G: query heads per kv head, GB of them in a tile, HPT kv heads in a tile."""
    PER: tl.constexpr = GB * HPT
    ROWS: tl.constexpr = QT * PER
    PIECES: tl.constexpr = (G + GB - 1) // GB
    GROUPS: tl.constexpr = (K // HPT) * PIECES
    p = tl.program_id(0)
    wait_for_inputs(EARLY)
    share = tl.load(head + SHARE).to(tl.int32)
    total = tl.load(head + TOTAL).to(tl.int32)
    row = tl.load(starts + p)
    table = tl.load(head + TABLE)
    width = tl.load(head + WIDTH)
    offs_r = tl.arange(0, BLOCK_M)
    row_token = offs_r // PER
    row_head = (offs_r % PER) // GB
    row_group = offs_r % GB
    if SCALES:
        scale = scale * tl.load(k_scale)
        v_mul = tl.load(v_scale)
    else:
        v_mul = v_scale
    unit = p * share
    end = tl.minimum(unit + share, total)
    while unit < end:
        # All of the row's record at once: it is right for the first segment, and a step further for most others.
        after = tl.load(prefix + row + 1)
        before = tl.load(prefix + row)
        begin = tl.load(rows + 3 * row)
        q_len = tl.load(rows + 3 * row + 1)
        kv_len = tl.load(rows + 3 * row + 2)
        while after <= unit:
            row += 1
            before = after
            after = tl.load(prefix + row + 1)
            begin = tl.load(rows + 3 * row)
            q_len = tl.load(rows + 3 * row + 1)
            kv_len = tl.load(rows + 3 * row + 2)
        units = (after - before) // GROUPS
        group = (unit - before) // units
        unit_first = before + group * units
        c0 = unit - unit_first
        if FIXED:
            c1 = c0 + 1
        else:
            c1 = tl.minimum(units, c0 + end - unit)
        kv_head = (group // PIECES) * HPT
        in_group = (group % PIECES) * GB + row_group
        ok = (row_token < q_len) & (offs_r < ROWS) & (in_group < G)
        token = begin + row_token
        q_head = (kv_head + row_head) * G + in_group
        row_pos = kv_len - q_len + row_token
        lo, hi = visible_range(kv_len - q_len, kv_len - 1, kv_len, window, CAUSAL, WINDOW)
        tile_lo = lo // BLOCK_N
        tile_hi = (hi + BLOCK_N - 1) // BLOCK_N
        t0 = tile_lo + c0 * unit_tiles
        t1 = tl.minimum(tile_lo + c1 * unit_tiles, tile_hi)
        qt = load_q(q, token, q_head, stride_qt, stride_qh, tl.arange(0, DP), ok, D, DP, UPCAST)
        if DR > 0:
            qr = load_q(q + DP, token, q_head, stride_qt, stride_qh, tl.arange(0, DR), ok, DR, DR, UPCAST)
        else:
            qr = qt
        if ALIBI:
            slope = tl.load(slopes + q_head, mask=ok, other=0.0).to(tl.float32) * LOG2E
        else:
            slope = tl.zeros([BLOCK_M], tl.float32)
        if PAGE == 0:
            table_row = tl.load(kv_start + row)
        else:
            table_row = table.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * width
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DVP], tl.float32)
        m, l, acc = attend(qt, qr, m, l, acc, k, v, table_row, t0, t1, lo, hi, row_pos, row_head, slope,
                           scale, softcap, window, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                           kv_head, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, FP8, UPCAST, LATENT, SAME, HPT, BLOCK_N, PAGE,
                           D, DP, DV, DVP, DR, PACK_K, PACK_V, STAGES)
        if (c0 == 0) & (c1 == units):
            finish(out, lse, sinks, v_mul, m, l, acc, token, q_head, ok, stride_ot, stride_oh, stride_lt,
                   SINKS, LSE, DV, DVP)
        else:
            if FIXED:
                first = unit_first
                slot = unit
                step = 1
                parts = units
            else:
                owner = unit_first // share
                first = 2 * owner + 1
                slot = tl.where(c0 == 0, 2 * p + 1, 2 * p)
                step = 2
                parts = (unit_first + units - 1) // share - owner + 1
            offs_v = tl.arange(0, DVP)
            empty = m == -float("inf")
            safe = tl.where(empty, 1.0, l)
            place = slot.to(tl.int64) * ROWS + offs_r
            tl.store(ws_lse + place, tl.where(empty, -float("inf"), m + tl.log2(safe)), mask=ok)
            tl.store(ws_acc + place[:, None] * DVP + offs_v[None, :], acc / safe[:, None], mask=ok[:, None])
            # Every thread's part is stored before this program counts as arrived.
            tl.debug_barrier()
            counter = counters + row * GROUPS + group
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.store(counter, 0)
                m, l, acc = _merge(ws_acc, ws_lse, first, step, parts, offs_r, ok, ROWS, BLOCK_M, DVP,
                                   AT_ONCE)
                finish(out, lse, sinks, v_mul, m, l, acc, token, q_head, ok, stride_ot, stride_oh, stride_lt,
                       SINKS, LSE, DV, DVP)
        unit += c1 - c0
        if unit >= after:
            row += 1
