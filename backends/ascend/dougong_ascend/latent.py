"""MLA through the fused operator: a latent plane of 512, a rope plane of 64, one kv head."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import AttentionQuery, Device, GroupView, LayerCache, Refusal
from dougong_ascend.attention import FusedAttention
from dougong_ascend.graphs import AscendGraph
from dougong_ascend.layouts import LATENT, LATENT_NZ
from dougong_ascend.limits import latent_refusals
from dougong_ascend.plans import FusedPlan, RowCall
from dougong_ascend.store import check_planes

__all__ = ["LatentAttention", "TiledLatentAttention"]

#: Most queries of a row in one call.
_MOST = 16
#: Query heads that the operator's first version takes; the second takes every power of two up to 128.
_FIRST_VERSION_HEADS = (32, 64, 128)


class LatentPlan(FusedPlan):
    """Rows of more than 16 queries are cut: each piece sees the keys up to its own last query."""

    def _pages(self, queries: int) -> bool:
        return True

    def _joins(self, queries: int) -> bool:
        return queries <= _MOST

    def _others(self, view: GroupView, kv_lens: list[int], cu_q: list[int], first: int, last: int) -> list[RowCall]:
        queries = cu_q[first + 1] - cu_q[first]
        if queries <= _MOST:
            return super()._others(view, kv_lens, cu_q, first, last)
        start, before = cu_q[first], kv_lens[first] - queries
        used = torch.arange(view.block_table.shape[1], device=view.block_table.device) * self._block < kv_lens[first]
        table = torch.where(used, view.block_table[first], 0)
        found = []
        whole, rest = divmod(queries, _MOST)
        pieces = [(0, whole, _MOST)] + ([(whole * _MOST, 1, rest)] if rest else [])
        for begin, rows, size in pieces:
            lengths = [before + begin + size * (row + 1) for row in range(rows)]
            blind = sum(length <= 0 for length in lengths)  # pieces whose queries all see nothing
            begin, rows, lengths = begin + blind * size, rows - blind, lengths[blind:]
            if rows:
                call = RowCall(start + begin, start + begin + rows * size, rows, size, lengths)
                call.table = table.expand(rows, -1).contiguous()
                call.blocks = self._named(lengths)
                call.blind = self._any_blind(call)
                found.append(call)
        return found


class LatentAttention(FusedAttention):
    """The operator with its ``query_rope`` and ``key_rope``."""

    layouts = (LATENT,)  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.spec.num_heads not in _FIRST_VERSION_HEADS:
            self._version = 2

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return latent_refusals(query)

    def new_plan(self) -> FusedPlan:
        return LatentPlan(self.spec, self.group, self.limits, self.device.torch_device)

    def _paged_planes(self, kv: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
        check_planes(kv)
        latent = self._pages_of(kv.planes["latent"])
        return latent, latent

    def _pages_of(self, plane: torch.Tensor) -> torch.Tensor:
        """[blocks, N, D]: the one head merged into a token."""
        return plane.flatten(2)

    def _call(
        self,
        call: RowCall,
        q: torch.Tensor,
        kv: LayerCache,
        keys: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        graph: AscendGraph | None,
    ) -> None:
        spec, split = self.spec, self.spec.head_dim_v
        shape = call.rows, call.queries, spec.num_heads, spec.head_dim - split
        rope = q[call.start : call.stop, :, split:].reshape(shape)
        heads_first = self._heads_first and (call.queries == 1 or spec.num_heads * split >= 65535)
        arguments: dict[str, Any] = {
            "actual_seq_lengths_kv": call.kv_lens,
            "scale": scale,
            "block_table": call.table,
            "block_size": self.group.kernel_block,
            "query_rope": (rope.transpose(1, 2) if heads_first else rope).contiguous(),
            "key_rope": self._pages_of(kv.planes["rope"]),
        }
        # The operator's query is the latent part alone; its tokens keep their places in the batch.
        self._fused(call, q[..., :split], *keys, arguments, out, lse, graph)


class TiledLatentAttention(LatentAttention):
    """The same over planes in tiles (NZ), [blocks, 1, D/16, N, 16], which take tokens before heads only."""

    layouts = (LATENT_NZ,)  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._heads_first = False

    @classmethod
    def supports(cls, query: AttentionQuery, device: Device) -> tuple[Refusal, ...]:
        return latent_refusals(query, tiled=True)

    def _pages_of(self, plane: torch.Tensor) -> torch.Tensor:
        return plane
