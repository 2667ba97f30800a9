"""Attention for rows of many queries (prefill, chunks, mixed batches): compute-bound, one query tile per program.

A tile packs the query heads of one kv head: `QT = BLOCK_M // GB` consecutive tokens by GB heads, so each K/V tile is
read once for all of them and a causal row wastes less on the diagonal. Tiles come from the plan's item list, those with
the most keys first. Keys that every row of the tile sees run through an unmasked loop, the rest through a masked one.
"""

import triton
import triton.language as tl

from dougong_kernels.triton.planning import ITEMS, TABLE, WIDTH
from dougong_kernels.triton.tiles import LOG2E, attend, finish, load_q, visible_range


@triton.jit(do_not_specialize=["max_items", "window"])
def extend_kernel(q, k, v, out, lse, head, items, rows, kv_start, k_scale, v_scale, sinks, slopes, scale, softcap,
                  window, stride_qt, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                  stride_ot, stride_oh, stride_lt, max_items,
                  K: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, BLOCK_M: tl.constexpr, QT: tl.constexpr,
                  BLOCK_N: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
                  DV: tl.constexpr, DVP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                  SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SCALES: tl.constexpr,
                  LSE: tl.constexpr, FP8: tl.constexpr, UPCAST: tl.constexpr, LATENT: tl.constexpr,
                  SAME: tl.constexpr, PACK_K: tl.constexpr, PACK_V: tl.constexpr,
                  HEADS_OUTER: tl.constexpr, STAGES: tl.constexpr):
    """Grid: max_items * head groups programs; those past the plan's item count leave at once."""
    PIECES: tl.constexpr = (G + GB - 1) // GB
    GROUPS: tl.constexpr = K * PIECES
    p = tl.program_id(0)
    if HEADS_OUTER:
        item = p % max_items
        group = p // max_items
    else:
        item = p // GROUPS
        group = p % GROUPS
    if item < tl.load(head + ITEMS).to(tl.int32):
        row = tl.load(items + 2 * item)
        q_tile = tl.load(items + 2 * item + 1)
        begin = tl.load(rows + 3 * row)
        q_len = tl.load(rows + 3 * row + 1)
        kv_len = tl.load(rows + 3 * row + 2)
        kv_head = group // PIECES
        offs_r = tl.arange(0, BLOCK_M)
        in_tile = offs_r // GB
        row_token = q_tile * QT + in_tile
        in_group = (group % PIECES) * GB + offs_r % GB
        ok = (row_token < q_len) & (in_tile < QT) & (in_group < G)
        token = begin + row_token
        q_head = kv_head * G + in_group
        pos_first = kv_len - q_len + q_tile * QT
        pos_last = tl.minimum(pos_first + QT, kv_len) - 1
        row_pos = kv_len - q_len + row_token
        lo, hi = visible_range(pos_first, pos_last, kv_len, window, CAUSAL, WINDOW)
        tile_lo = lo // BLOCK_N
        tile_hi = (hi + BLOCK_N - 1) // BLOCK_N
        if SCALES:
            scale = scale * tl.load(k_scale)
            v_mul = tl.load(v_scale)
        else:
            v_mul = v_scale
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
            table = tl.load(head + TABLE)
            table_row = table.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * tl.load(head + WIDTH)
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DVP], tl.float32)
        if WINDOW:
            tile_full = tile_lo
        else:
            if CAUSAL:
                tile_full = tl.maximum((pos_first + 1) // BLOCK_N, 0)
            else:
                tile_full = kv_len // BLOCK_N
            tile_full = tl.minimum(tile_full, tile_hi)
            m, l, acc = attend(qt, qr, m, l, acc, k, v, table_row, tile_lo, tile_full, lo, hi, row_pos, row_pos, slope,
                               scale, softcap, window, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                               kv_head, False, CAUSAL, WINDOW, SOFTCAP, ALIBI, FP8, UPCAST, LATENT, SAME, 1, BLOCK_N,
                               PAGE, D, DP, DV, DVP, DR, PACK_K, PACK_V, STAGES)
        m, l, acc = attend(qt, qr, m, l, acc, k, v, table_row, tile_full, tile_hi, lo, hi, row_pos, row_pos, slope,
                           scale, softcap, window, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                           kv_head, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, FP8, UPCAST, LATENT, SAME, 1, BLOCK_N,
                           PAGE, D, DP, DV, DVP, DR, PACK_K, PACK_V, STAGES)
        finish(out, lse, sinks, v_mul, m, l, acc, token, q_head, ok, stride_ot, stride_oh, stride_lt,
               SINKS, LSE, DV, DVP)
