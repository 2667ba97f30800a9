"""The plan kernel: lengths on the device become the work lists that the attention kernels walk.

One launch per step, by one program, so that nothing is read back by the host and a captured graph of the attention
kernels stays right when lengths, composition and even the addresses of the block table change between replays.

`head` (int64) holds SHARE units per program, TOTAL units, ITEMS extend tiles, TABLE the block table's address, WIDTH
its row stride. A unit is `unit_tiles` key tiles of one head group. `prefix` [B+1] int32 counts units before each row.
`starts` [programs] int32 is the row in which each program begins. `rows` [B, 3] int32: first token, query length,
kv length. `items` [ITEMS, 2] int32: row and query tile, the longest of each row first.
"""

import triton
import triton.language as tl

from dougong_kernels.triton.tiles import visible_range

SHARE = tl.constexpr(0)
TOTAL = tl.constexpr(1)
ITEMS = tl.constexpr(2)
TABLE = tl.constexpr(3)
WIDTH = tl.constexpr(4)


@triton.jit
def _row_of(prefix, target, num_rows, STEPS: tl.constexpr):
    """The row b with prefix[b] <= target < prefix[b+1], for each target of a vector; num_rows when past the end."""
    low = tl.zeros_like(target)
    high = low + num_rows
    for _ in range(STEPS):
        mid = (low + high) // 2
        after = tl.load(prefix + mid + 1, mask=mid < num_rows, other=2147483647)
        go = (after <= target) & (low < high)
        high = tl.where(go, high, tl.minimum(high, mid))
        low = tl.where(go, mid + 1, low)
    return low


@triton.jit(do_not_specialize=["num_rows", "short", "groups", "programs", "min_units", "half_below", "unit_tiles",
                               "width", "extend_tokens", "keys", "window"])
def plan_kernel(cu_q, kv_len, table, head, prefix, tiles, starts, rows, items,
                num_rows, short, groups, programs, min_units, half_below, unit_tiles, width, extend_tokens, keys,
                window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of 1 to `short` queries go to the split kernel (one query tile each), longer ones to the extend kernel.

    `keys` in a key tile, `extend_tokens` in a query tile of the extend kernel. With fewer than `half_below` units for
    each program, half of the programs share them: merging twice as many parts would cost more than it hides.
    """
    lane = tl.arange(0, BLOCK)
    units_before = 0
    tiles_before = 0
    tl.store(prefix, 0)
    tl.store(tiles, 0)
    for first in range(0, num_rows, BLOCK):
        b = first + lane
        ok = b < num_rows
        begin = tl.load(cu_q + b, mask=ok, other=0)
        q_len = tl.load(cu_q + b + 1, mask=ok, other=0) - begin
        kv = tl.load(kv_len + b, mask=ok, other=0)
        tl.store(rows + 3 * b, begin, mask=ok)
        tl.store(rows + 3 * b + 1, q_len, mask=ok)
        tl.store(rows + 3 * b + 2, kv, mask=ok)
        lo, hi = visible_range(kv - q_len, kv - 1, kv, window, CAUSAL, WINDOW)
        count = (hi + keys - 1) // keys - lo // keys
        # A row that sees nothing still has its zeros to write.
        count = tl.maximum((count + unit_tiles - 1) // unit_tiles, 1) * groups
        units = tl.where((q_len > 0) & (q_len <= short), count, 0)
        units_after = tl.cumsum(units, 0) + units_before
        tl.store(prefix + b + 1, units_after, mask=ok)
        q_tiles = tl.where(q_len > short, (q_len + extend_tokens - 1) // extend_tokens, 0)
        tiles_after = tl.cumsum(q_tiles, 0) + tiles_before
        tl.store(tiles + b + 1, tiles_after, mask=ok)
        units_before += tl.sum(units, 0)
        tiles_before += tl.sum(q_tiles, 0)
    share = (units_before + programs - 1) // programs
    if share < half_below:
        share = (2 * units_before + programs - 1) // programs
    share = tl.maximum(share, min_units)
    tl.store(head + SHARE, share.to(tl.int64))
    tl.store(head + TOTAL, units_before.to(tl.int64))
    tl.store(head + ITEMS, tiles_before.to(tl.int64))
    tl.store(head + TABLE, table.to(tl.int64, bitcast=True))
    tl.store(head + WIDTH, width.to(tl.int64))
    tl.debug_barrier()
    if units_before > 0:
        for first in range(0, programs, BLOCK):
            p = first + lane
            row = _row_of(prefix, p * share, num_rows, STEPS)
            tl.store(starts + p, row, mask=p < programs)
    for first in range(0, tiles_before, BLOCK):
        i = first + lane
        ok = i < tiles_before
        row = _row_of(tiles, tl.where(ok, i, 0), num_rows, STEPS)
        last = tl.load(tiles + row + 1, mask=ok, other=0) - 1
        tl.store(items + 2 * i, row, mask=ok)
        tl.store(items + 2 * i + 1, last - i, mask=ok)
