"""The persistent batch: what is known of every running request, kept on host and device, changed only where it changes.

A request keeps one slot (its ``batch_index``) while it runs. The host mirrors the block tables; the device holds
them too, with the token that each slot sampled last. A step's rows are gathered from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dougong.execution.delta import StepDelta
from dougong.execution.staging import DeviceViews, HostBuffer, Sections, StagingRing
from dougong.hal import BatchView, Device, GroupView, KVGroup

__all__ = ["PersistentBatch", "StagedStep"]

_MIN_WIDTH = 8


class StagedStep:
    """A step whose metadata is on its way to the device.

    ``views`` and ``batch`` have padding included; the first ``num_samples`` entries of the sections ``sample_*`` count.
    ``sample_slots`` and ``sample_positions`` [num_samples] int64 are those sections on the host, valid until the next
    steps take the buffer.
    """

    __slots__ = ("batch", "num_samples", "sample_positions", "sample_slots", "views")

    def __init__(self, views: DeviceViews, batch: BatchView, num_samples: int, words: npt.NDArray[np.int64]) -> None:
        self.views = views
        self.batch = batch
        self.num_samples = num_samples
        slots, positions = views.sections.sample_slots, views.sections.sample_positions
        self.sample_slots = words[slots : slots + num_samples]
        self.sample_positions = words[positions : positions + num_samples]


class PersistentBatch:
    """Slots, block tables and staging of up to ``max_rows`` requests.

    Slot ``max_rows`` is the padding's: its tables name the scratch blocks, and padding tokens of a step write scratch
    slots 0, 1, 2 … one each.

    Args:
        groups: the KV groups, in the order of their index.
        max_rows: seats (``max_num_seqs``).
        max_tokens: the most tokens of a step, padding included.
        max_len: the most tokens of a request.
        num_scratch: manager blocks at the start of each group's pool that nobody owns, by group.
        in_place: whether a device that is the host may read the host's own buffers.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        device: Device,
        *,
        max_rows: int,
        max_tokens: int,
        max_len: int,
        num_scratch: Sequence[int],
        in_place: bool = True,
    ) -> None:
        self.groups = tuple(groups)
        self.max_rows = max_rows
        self.max_len = max_len
        self.pad_slot = max_rows
        self.widths = tuple(
            -(-max_len // group.manager_block) * (group.manager_block // group.kernel_block) for group in groups
        )
        #: Slots that padding tokens write, by group. Only a warm-up, which is all padding, writes one twice.
        self._scratch = [scratch * group.manager_block for group, scratch in zip(groups, num_scratch)]
        self._ratios = [group.manager_block // group.kernel_block for group in groups]
        rows = max_rows + 1
        self._change_words = 3 * max(256, 2 * max_rows)
        words = Sections.words(max_tokens, rows, len(self.groups)) + self._change_words * len(self.groups)
        self.ring = StagingRing(device, words, in_place=in_place)
        where = device.torch_device
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=where)
        self._tables: list[npt.NDArray[np.int32]] = []
        self.tables: list[torch.Tensor] = []
        for width, ratio, scratch in zip(self.widths, self._ratios, num_scratch):
            host = torch.zeros(rows, width, dtype=torch.int32)
            count = min(width, scratch * ratio)
            host[self.pad_slot, :count] = torch.arange(count, dtype=torch.int32)
            self._tables.append(host.numpy())
            self.tables.append(host if self.ring.in_place else host.to(where, copy=True))
        self._slots = np.zeros(0, dtype=np.int64)
        self._positions = np.zeros(0, dtype=np.int64)
        self._sections: dict[tuple[int, int], Sections] = {}

    def table(self, group: int) -> npt.NDArray[np.int32]:
        """The host's mirror of a group's kernel-block table, [slots + 1, W]."""
        return self._tables[group]

    def stage(
        self,
        delta: StepDelta,
        *,
        rows: int = 0,
        tokens: int = 0,
        tables: Sequence[torch.Tensor] | None = None,
        decode: bool | None = None,
    ) -> StagedStep:
        """Take the step's changes and send its metadata.

        Args:
            rows, tokens: sizes to pad to (0: none). Padding rows of a step whose rows are all decodes have one token
                each; otherwise one padding row holds all padding tokens and the rest are empty.
            tables: per group, [rows, W] int32 buffers for the gathered block tables (a captured graph's own). Bounds
                and counts that the kernels see are then those of the size, whatever the step's rows hold.
            decode: whether all rows are decodes, where there are no rows to tell it.
        """
        if decode is None:
            decode = delta.num_decode_rows == delta.num_rows
        real_rows, real_tokens = delta.num_rows, delta.num_tokens
        rows, tokens = max(rows, real_rows), max(tokens, real_tokens)
        key = (tokens, rows)
        sections = self._sections.get(key)
        if sections is None:
            if len(self._sections) >= 256:
                self._sections.clear()
            sections = self._sections[key] = Sections(tokens, rows, len(self.groups))
        touched = self._apply_changes(delta)
        buffer = self.ring.acquire()
        num_samples, max_kv, max_q = self._fill(delta, decode, buffer, sections)
        words, direct = self._fill_changes(buffer, sections, touched)
        base = self.ring.send(buffer, words)
        if touched and not self.ring.in_place:
            self._scatter_changes(base, sections, touched, direct)
        views, host = self.ring.views(buffer, sections), buffer.views(sections)
        decodes = rows if decode else delta.num_decode_rows
        if tables is not None:
            max_kv = self.max_len
            if not decode:
                decodes, max_q = 0, tokens
        batch = BatchView(
            rows, tokens, decodes, max_q, views.cu_q, host.cu_q,
            tuple(
                GroupView(views.kv_len, host.kv_len, max_kv, self._gather(g, views.row_slots, max_kv, tables), slots)
                for g, slots in enumerate(views.slots)
            ),
        )  # fmt: skip
        return StagedStep(views, batch, num_samples, buffer.array)

    # -- block tables ------------------------------------------------------------------------------------

    def _apply_changes(self, delta: StepDelta) -> list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Change the host's mirror; returns per changed group (group, flat places [U], new values [U])."""
        touched = []
        for group, change in enumerate(delta.changes):
            if change is None:
                continue
            table, ratio = self._tables[group], self._ratios[group]
            width = table.shape[1]
            if ratio == 1:
                places = change.rows * width + change.columns
                blocks = change.blocks
            else:
                inner = np.arange(ratio, dtype=np.int64)
                places = ((change.rows * width + change.columns * ratio)[:, None] + inner).ravel()
                blocks = (change.blocks[:, None] * ratio + inner).ravel()
                blocks[np.repeat(change.blocks == 0, ratio)] = 0
            flat = table.reshape(-1)
            flat[places] = blocks
            # An entry that changed twice holds its last value: the device gets that one both times.
            touched.append((group, places, flat[places].astype(np.int64)))
        return touched

    def _fill_changes(
        self,
        buffer: HostBuffer,
        sections: Sections,
        touched: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    ) -> tuple[int, list[int]]:
        """Write the changes behind the sections; returns the words used and each change's offset (-1: too many)."""
        place = sections.changes
        offsets: list[int] = []
        if self.ring.in_place:
            return place, offsets
        for _, places, values in touched:
            count = len(places)
            if place + 2 * count > self.ring.words:
                offsets.append(-1)
                continue
            buffer.array[place : place + count] = places
            buffer.array[place + count : place + 2 * count] = values
            offsets.append(place)
            place += 2 * count
        return place, offsets

    def _scatter_changes(
        self,
        base: torch.Tensor,
        sections: Sections,
        touched: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]],
        offsets: list[int],
    ) -> None:
        for (group, places, _), offset in zip(touched, offsets):
            table = self.tables[group]
            count = len(places)
            if offset >= 0:
                values = base[offset + count : offset + 2 * count].to(torch.int32)
                table.view(-1).index_copy_(0, base[offset : offset + count], values)
                continue
            for row in np.unique(places // table.shape[1]).tolist():  # whole rows: a burst of long prompts
                table[row].copy_(torch.from_numpy(self._tables[group][row].copy()))

    def _gather(
        self, group: int, row_slots: torch.Tensor, max_kv: int, tables: Sequence[torch.Tensor] | None
    ) -> torch.Tensor:
        """The rows' block tables [B, W'] int32, W' a bound on what the step's lengths need."""
        source = self.tables[group]
        if tables is not None:
            return torch.index_select(source, 0, row_slots, out=tables[group])
        needed = -(-max_kv // self.groups[group].kernel_block)
        width = min(source.shape[1], max(_MIN_WIDTH, 1 << max(0, needed - 1).bit_length()))
        return source[:, :width].index_select(0, row_slots)

    # -- rows and tokens ---------------------------------------------------------------------------------

    def _fill(self, delta: StepDelta, decode: bool, buffer: HostBuffer, sections: Sections) -> tuple[int, int, int]:
        """Write all sections but the changes; returns (rows that sample, largest kv_len, largest q_len)."""
        if delta.same_rows:
            slots, positions = self._slots, self._positions
            positions += 1
            return self._fill_decodes(slots, positions, -1 - slots, delta, buffer, sections)
        assert delta.slots is not None and delta.starts is not None
        if decode:
            self._slots, self._positions = delta.slots, delta.starts.copy()
            assert delta.token_ids is not None
            return self._fill_decodes(self._slots, self._positions, delta.token_ids, delta, buffer, sections)
        return self._fill_mixed(delta, buffer, sections)

    def _fill_decodes(
        self,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int64],
        delta: StepDelta,
        buffer: HostBuffer,
        sections: Sections,
    ) -> tuple[int, int, int]:
        words = buffer.array
        n, rows = delta.num_rows, sections.rows
        s = sections
        words[s.token_ids : s.token_ids + n] = token_ids
        words[s.positions : s.positions + n] = positions
        words[s.row_slots : s.row_slots + n] = slots
        words[s.sample_slots : s.sample_slots + n] = slots
        np.add(positions, 1, out=words[s.sample_positions : s.sample_positions + n])
        words[s.sample_index : s.sample_index + rows] = np.arange(rows)
        self._fill_slots(words, s, slots, positions)
        halves = words.view(np.int32)
        kv = halves[2 * s.kv_len : 2 * s.kv_len + rows]
        halves[2 * s.cu_q : 2 * s.cu_q + rows + 1] = np.arange(rows + 1)
        np.add(positions, 1, out=kv[:n], casting="unsafe")
        if rows > n:
            self._pad(words, s, n, n)
            words[s.sample_slots + n : s.sample_slots + rows] = self.pad_slot
            words[s.sample_positions + n : s.sample_positions + rows] = 0
            kv[n:] = 1
        return n, int(kv.max()), 1

    def _fill_mixed(self, delta: StepDelta, buffer: HostBuffer, sections: Sections) -> tuple[int, int, int]:
        assert delta.slots is not None and delta.starts is not None and delta.lengths is not None
        assert delta.token_ids is not None and delta.sample_rows is not None
        words, s = buffer.array, sections
        n, t, rows = delta.num_rows, delta.num_tokens, sections.rows
        ends = np.cumsum(delta.lengths)
        token_row = np.repeat(np.arange(n), delta.lengths)
        positions = np.arange(t) + (delta.starts - (ends - delta.lengths))[token_row]
        words[s.token_ids : s.token_ids + t] = delta.token_ids
        words[s.positions : s.positions + t] = positions
        words[s.row_slots : s.row_slots + n] = delta.slots
        self._fill_slots(words, s, delta.slots[token_row], positions)
        after = delta.starts + delta.lengths
        samples = len(delta.sample_rows)
        words[s.sample_index : s.sample_index + samples] = ends[delta.sample_rows] - 1
        words[s.sample_slots : s.sample_slots + samples] = delta.slots[delta.sample_rows]
        words[s.sample_positions : s.sample_positions + samples] = after[delta.sample_rows]
        halves = words.view(np.int32)
        cu_q = halves[2 * s.cu_q : 2 * s.cu_q + rows + 1]
        kv = halves[2 * s.kv_len : 2 * s.kv_len + rows]
        cu_q[0] = 0
        cu_q[1 : n + 1] = ends
        kv[:n] = after
        longest = int(delta.lengths.max()) if n else 0
        if rows > n:  # one row for the padding's tokens, empty ones behind it
            self._pad(words, s, n, t)
            cu_q[n + 1 :] = s.tokens
            kv[n] = s.tokens - t
            kv[n + 1 :] = 0
            longest = max(longest, s.tokens - t)
        assert rows > n or s.tokens == t, "padding tokens need a padding row"
        return samples, int(kv.max()) if rows else 0, longest

    def _pad(self, words: npt.NDArray[np.int64], s: Sections, rows: int, tokens: int) -> None:
        count = s.tokens - tokens
        words[s.token_ids + tokens : s.token_ids + s.tokens] = 0
        words[s.positions + tokens : s.positions + s.tokens] = 0
        for g in range(s.groups):
            start = s.slots + g * s.tokens + tokens
            words[start : start + count] = np.arange(count) % self._scratch[g]
        words[s.row_slots + rows : s.row_slots + s.rows] = self.pad_slot

    def _fill_slots(
        self,
        words: npt.NDArray[np.int64],
        s: Sections,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
    ) -> None:
        """Cache slots of tokens at ``positions`` of the requests in ``slots``, for every group."""
        count = len(positions)
        for g, group in enumerate(self.groups):
            size = group.kernel_block
            block = positions // size
            start = s.slots + g * s.tokens
            out = words[start : start + count]
            np.multiply(self._tables[g][slots, block], size, out=out, dtype=np.int64)
            out += positions - block * size
