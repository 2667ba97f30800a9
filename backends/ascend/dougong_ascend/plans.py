"""How a batch becomes calls of the fused operator.

Rows of one query each at the head of the batch are one call (the operator's incremental branch). Every other run of
rows with equally many queries is one call (its prompt branch). What the operator must not see is taken away here: block
ids that are garbage, blocks behind a window, rows without a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dougong.errors import EngineError
from dougong.hal import AttentionSpec, BatchView, GroupView, KVGroup, Limits, Plan

__all__ = ["FusedPlan", "GatheredPlan", "RowCall", "host_lengths"]


@dataclass(slots=True)
class RowCall:
    """Rows that go into one call: tokens ``start`` … ``stop``-1 of the batch, ``queries`` of them per row.

    ``table`` [rows, W'] int32 where the call pages; ``slots`` [S] int64 where it reads gathered keys instead.
    ``kv_lens`` by row, counted from the table's first block. ``mask`` [rows, 1, 1, S] bool, True where a single query
    must not look. ``blind``: some of its queries see nothing. ``blocks`` that its rows name together.
    """

    start: int
    stop: int
    rows: int
    queries: int
    kv_lens: list[int]
    table: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    blind: bool = False
    blocks: int = 0

    def within(self, blocks: int, size: int) -> Iterator[RowCall]:
        """The call, cut so that no part names more than ``blocks`` blocks of ``size`` keys: the operator wants a cache
        of as many as all rows of a call name, also where they share them."""
        if self.blocks <= blocks:
            yield self
            return
        first = named = 0
        for row, kv_len in enumerate(self.kv_lens):
            needed = -(-kv_len // size)
            if named and named + needed > blocks:
                yield self._rows(first, row)
                first, named = row, 0
            named += needed
        yield self._rows(first, self.rows)

    def _rows(self, first: int, last: int) -> RowCall:
        assert self.table is not None
        return replace(
            self, start=self.start + first * self.queries, stop=self.start + last * self.queries, rows=last - first,
            kv_lens=self.kv_lens[first:last], table=self.table[first:last],
            mask=None if self.mask is None else self.mask[first:last],
        )  # fmt: skip


def host_lengths(view: GroupView) -> torch.Tensor:
    """kv_len [B] on the host; asks the device where the batch does not know it."""
    return view.kv_len.cpu() if view.host_kv_len is None else view.host_kv_len


class FusedPlan(Plan):
    """A batch's calls. The first, of decodes, has buffers of fixed addresses, which a captured graph reads."""

    def __init__(self, spec: AttentionSpec, group: KVGroup, limits: Limits, device: torch.device) -> None:
        self._spec = spec
        self._index = group.index
        self._block = group.kernel_block
        self._quantized = spec.kv_dtype != spec.dtype
        self._most_keys = limits.max_kv_len
        rows, width = limits.max_rows, limits.max_blocks
        if spec.window is not None:
            width = min(width, -(-(spec.window - 1) // self._block) + 1)
        self._width = width
        self._table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._mask = None
        if spec.window is not None:
            self._mask = torch.zeros(rows, 1, 1, width * self._block, dtype=torch.bool, device=device)
        self.blind = torch.zeros(limits.max_tokens, 1, dtype=torch.bool, device=device)
        """[tokens, 1]: queries that see nothing."""
        self.any_blind = False
        self._marks = torch.zeros(0, dtype=torch.bool)
        self.calls: list[RowCall] = []

    def fill(self, batch: BatchView) -> None:
        """Work out the calls of ``batch``."""
        self.batch = batch
        view = batch.groups[self._index]
        lengths = host_lengths(view)
        kv_lens, cu_q = lengths.tolist(), batch.host_cu_q.tolist()
        rows, tokens, longest = self._table.shape[0], self.blind.shape[0], max(kv_lens, default=0)
        if batch.num_rows > rows or batch.num_tokens > tokens or longest > self._most_keys:
            raise EngineError(
                f"a batch of {batch.num_rows} rows and {batch.num_tokens} tokens, {longest} keys in the longest; this "
                f"kernel was made for {rows} rows, {tokens} tokens and {self._most_keys} keys. Raise its Limits."
            )
        self._mark_blind(batch.blind(self._spec, lengths))
        self.calls = []
        row = batch.num_decode_rows if self._pages(1) else 0
        if row:
            self.calls.append(self._decodes(view, kv_lens[:row], row))
        while row < batch.num_rows:
            queries, first = cu_q[row + 1] - cu_q[row], row
            row += 1
            if queries == 0 or kv_lens[first] == 0:  # nothing to ask, or nothing to see
                continue
            while (
                row < batch.num_rows and self._joins(queries) and queries == cu_q[row + 1] - cu_q[row] and kv_lens[row]
            ):
                row += 1
            self.calls += self._others(view, kv_lens, cu_q, first, row)

    def _pages(self, queries: int) -> bool:
        """Whether the operator reads blocks of this size: any multiple of 16 under one query, of 128 under more, and
        then none of int8."""
        return queries == 1 or (self._block % 128 == 0 and not self._quantized)

    def _joins(self, queries: int) -> bool:
        """Whether rows of equally many queries may go into one call."""
        return self._pages(queries)

    # -- rows ---------------------------------------------------------------------------------------------------

    def _decodes(self, view: GroupView, kv_lens: list[int], rows: int) -> RowCall:
        """The leading rows of one query. A row without a key is given one, in block 0; its answer is replaced."""
        seen = [max(1, n) for n in kv_lens]
        table, mask, host = self._trim(view.block_table[:rows], view.kv_len[:rows], seen, 1, self._width)
        width = min(self._width, table.shape[1])
        buffer = self._table[:rows]  # past ``width`` it keeps old ids: the operator reads no entry past a row's keys
        buffer[:, :width].copy_(table[:, :width])
        call = RowCall(0, rows, rows, 1, host, table=buffer, blocks=self._named(host))
        if mask is not None and self._mask is not None:
            call.mask = self._mask[:rows]
            call.mask.copy_(mask)
        return call

    def _others(self, view: GroupView, kv_lens: list[int], cu_q: list[int], first: int, last: int) -> list[RowCall]:
        rows, queries = last - first, cu_q[first + 1] - cu_q[first]
        call = RowCall(cu_q[first], cu_q[last], rows, queries, kv_lens[first:last])
        call.blind = self._any_blind(call)
        lengths = view.kv_len[first:last]
        table = view.block_table[first:last]
        if self._pages(queries):
            table, mask, call.kv_lens = self._trim(table, lengths, call.kv_lens, queries, table.shape[1])
            call.table = table.contiguous()
            call.blocks = self._named(call.kv_lens)
            call.mask = mask if queries == 1 else None
        else:
            begin = self._behind(call.kv_lens[0], queries) * self._block
            if queries == 1 and self._spec.window is not None:  # modes are ignored for one query: cut instead
                begin = max(0, call.kv_lens[0] - self._spec.window)
            places = torch.arange(begin, call.kv_lens[0], device=table.device)
            block = torch.div(places, self._block, rounding_mode="floor")
            call.slots = table[0].to(torch.int64)[block] * self._block + places % self._block
            call.kv_lens = [call.kv_lens[0] - begin]
        return [call]

    def _named(self, kv_lens: list[int]) -> int:
        """Blocks that rows of these lengths name."""
        return sum(-(-n // self._block) for n in kv_lens)

    def _behind(self, kv_len: int, queries: int) -> int:
        """Blocks that lie wholly behind the window of a row's first query."""
        if self._spec.window is None:
            return 0
        return max(0, kv_len - queries - self._spec.window + 1) // self._block

    def _trim(
        self, table: torch.Tensor, lengths: torch.Tensor, kv_lens: list[int], queries: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
        """Tables that start at the first block in sight, with 0 for every entry past the last; a mask for single
        queries; and lengths from that start. ``table`` [rows, W] int32, ``lengths`` [rows] int32 on the device."""
        window, size = self._spec.window, self._block
        if window is None:
            positions = torch.arange(table.shape[1], device=table.device)
            used = positions[None] * size < lengths[:, None]
            return torch.where(used, table, 0), None, kv_lens
        first = torch.div((lengths - queries - window + 1).clamp(min=0), size, rounding_mode="floor")
        index = first[:, None] + torch.arange(width, device=table.device)
        used = index * size < lengths[:, None]
        picked = table.gather(1, index.clamp(max=table.shape[1] - 1).to(torch.int64))
        host = [kv_len - self._behind(kv_len, queries) * size for kv_len in kv_lens]
        places = torch.arange(width * size, device=table.device)
        hidden = places[None] < (lengths - window - first * size)[:, None]
        return torch.where(used, picked, 0), hidden[:, None, None, :], host

    def _mark_blind(self, marks: torch.Tensor) -> None:
        """Keep ``marks`` [T], of queries that see nothing. A captured graph reads them."""
        found = bool(marks.any())
        if self.any_blind:  # the batch before may have been a longer one
            self.blind.zero_()
        if found:
            self.blind[: len(marks)].copy_(marks[:, None])
        self.any_blind, self._marks = found, marks

    def _any_blind(self, call: RowCall) -> bool:
        return self.any_blind and bool(self._marks[call.start : call.stop].any())


class GatheredPlan(FusedPlan):
    """Every row's keys are gathered: for blocks that the operator does not read."""

    def _pages(self, queries: int) -> bool:
        return False
