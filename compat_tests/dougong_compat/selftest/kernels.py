"""Three attention kernels for host tensors, written apart from the core's reference and from each other: eager (gather
a row, one softmax), tiled (block by block, running maximum), split (parts merged by their LSE).

Bugs are planted here by replacing lines of this text (see ``mutants``), so each line stands for itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch

from dougong.hal import HND, NHD, AttentionKernel, AttentionQuery, LayerArgs, LayerCache, RaggedKV, Refusal
from dougong.hal.attention import Plan
from dougong_compat.selftest.recorder import HostGraph

__all__ = ["EagerKernel", "SplitKernel", "TiledKernel", "copy_blocks", "merge_lse"]

NEG = float("-inf")


class HostPlan(Plan):
    """Row bounds on the host, the table as it is."""

    cu: list[int]
    lens: list[int]
    table: torch.Tensor
    workspace: torch.Tensor | None = None


class HostKernel(AttentionKernel):
    """What the three share: planning, recording, pages, writes."""

    layouts = (NHD, HND)
    #: Whether K and V without a cache are taken, and a latent cache (V a view of K).
    whole_rows: ClassVar[bool] = True
    latent_rows: ClassVar[bool] = False

    @classmethod
    def supports(cls, query: AttentionQuery, device: Any) -> tuple[Refusal, ...]:
        if query.layout.name not in ("nhd", "hnd"):
            return (Refusal(f"layout {query.layout.name}", "nhd"),)
        if query.spec.latent and not cls.latent_rows:
            return (Refusal("a latent cache"),)
        if query.ragged and not cls.whole_rows:
            return (Refusal("K and V without a cache"),)
        return ()

    def new_plan(self) -> HostPlan:
        return HostPlan()

    def plan(self, batch: Any, into: Plan) -> None:
        assert isinstance(into, HostPlan)
        view = batch.groups[self.group.index]
        into.batch = batch
        into.cu = batch.cu_q.tolist()
        into.lens = view.kv_len.tolist()
        into.table = view.block_table

    def run(
        self,
        plan: Plan,
        layer: LayerArgs,
        q: torch.Tensor,
        kv: LayerCache | RaggedKV,
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        HostGraph.launch(partial(self._run, plan, layer, q, kv, out, lse))

    def _run(self, plan: Any, layer: LayerArgs, q: Any, kv: Any, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        scale = self.spec.scale
        for row in range(plan.batch.num_rows):
            start, stop = plan.cu[row], plan.cu[row + 1]
            if start == stop:
                continue
            got, got_lse = self.one_row(plan, layer, q[start:stop].float(), kv, row, scale)
            out[start:stop] = got.to(out.dtype)
            if lse is not None:
                lse[start:stop] = got_lse

    def one_row(
        self, plan: Any, layer: LayerArgs, q: torch.Tensor, kv: Any, row: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [Q, H, Dv], lse [Q, H]) float32 of one row's queries [Q, H, D]."""
        raise NotImplementedError

    def page(self, kv: LayerCache, plane: torch.Tensor, block: int) -> torch.Tensor:
        """One block's tokens [N, K, D], a view."""
        return plane[block] if kv.layout.name == "nhd" else plane[block].transpose(0, 1)

    def read(self, kv: LayerCache, layer: LayerArgs, table: torch.Tensor, begin: int, end: int) -> tuple[Any, Any]:
        """K [S, K, D] and V [S, K, Dv] of positions begin … end-1, float32."""
        n = kv.block_size
        positions = torch.arange(begin, end)
        blocks = table[positions // n].long()
        places = positions % n
        if kv.layout.name == "nhd":
            k, v = kv.k[blocks, places], kv.v[blocks, places]
        else:
            k, v = kv.k[blocks, :, places], kv.v[blocks, :, places]
        return self.scaled(layer, k, v)

    def scaled(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 K and V as the model means them."""
        k, v = k.float(), v.float()
        if self.spec.kv_dtype != self.spec.dtype:
            k = k * layer.k_scale
            v = v * layer.v_scale
        return k, v

    def first_key(self, q_len: int, kv_len: int) -> int:
        """The first position that any of the row's queries sees."""
        window = self.spec.window
        if window is None:
            return 0
        return min(kv_len, max(0, kv_len - q_len - window + 1))

    def scores(
        self, layer: LayerArgs, q: torch.Tensor, k: torch.Tensor, distance: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Masked scores [Q, H, S]; distance = k_pos - q_pos [Q, S]."""
        spec = self.spec
        wide = k.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)
        s = torch.einsum("qhd,shd->qhs", q, wide) * scale
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if spec.alibi:
            assert layer.slopes is not None
            s = s + layer.slopes[None, :, None] * distance[:, None, :]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if spec.causal:
            hidden = hidden | (distance > 0)
        if spec.window is not None:
            hidden = hidden | (distance.abs() >= spec.window)
        return s.masked_fill(hidden[:, None, :], NEG)

    def values(self, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """weights [Q, H, S] over V [S, K, Dv] -> [Q, H, Dv]."""
        wide = v.repeat_interleave(self.spec.num_heads // self.spec.num_kv_heads, dim=1)
        return torch.einsum("qhs,shd->qhd", weights, wide)

    def write(self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        HostGraph.launch(partial(self._write, layer, k, v, cache, slots))

    def _write(
        self, layer: LayerArgs, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        n = cache.block_size
        block, place = slots // n, slots % n
        planes = ((cache.k, k, layer.k_scale), (cache.v, v, layer.v_scale))
        for plane, x, scale in planes[:1] if self.spec.latent else planes:
            stored = self.stored(x, scale)
            if cache.layout.name == "nhd":
                plane[block, place] = stored
            else:
                plane[block, :, place] = stored

    def stored(self, x: torch.Tensor, scale: Any) -> torch.Tensor:
        """What goes into the cache for model values ``x``."""
        dtype = self.spec.kv_dtype
        if dtype == x.dtype:
            return x
        x = x.float() / scale
        if dtype == torch.int8:
            return x.round().clamp(-127, 127).to(dtype)
        top = torch.finfo(dtype).max
        return x.clamp(-top, top).to(dtype)


class EagerKernel(HostKernel):
    """Gather the row, one softmax."""

    latent_rows = True

    def one_row(
        self, plan: Any, layer: LayerArgs, q: torch.Tensor, kv: Any, row: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_len, H, _ = q.shape
        if isinstance(kv, RaggedKV):
            kv_len = int(kv.host_cu_k[row + 1] - kv.host_cu_k[row])
            first, at = 0, int(kv.host_cu_k[row])
            k, v = kv.k[at : at + kv_len].float(), kv.v[at : at + kv_len].float()
        else:
            kv_len = plan.lens[row]
            first = self.first_key(q_len, kv_len)
            k, v = self.read(kv, layer, plan.table[row], first, kv_len)
        if kv_len == first:
            return q.new_zeros(q_len, H, self.spec.head_dim_v), q.new_full((q_len, H), NEG)
        q_pos = kv_len - q_len + torch.arange(q_len)
        distance = torch.arange(first, kv_len)[None, :] - q_pos[:, None]
        s = self.scores(layer, q, k, distance, scale)
        lse = torch.logsumexp(s, -1)
        total = lse
        if layer.sinks is not None:
            total = torch.logaddexp(lse, layer.sinks.float()[None, :])
        weights = torch.exp(s - torch.where(total == NEG, 0.0, total)[..., None])
        return self.values(weights, v), lse


class TiledKernel(HostKernel):
    """Block by block with a running maximum."""

    whole_rows = False

    def one_row(
        self, plan: Any, layer: LayerArgs, q: torch.Tensor, kv: Any, row: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec, n = self.spec, kv.block_size
        q_len, kv_len = q.shape[0], plan.lens[row]
        H, Dv = spec.num_heads, spec.head_dim_v
        q_pos = kv_len - q_len + torch.arange(q_len)
        top = q.new_full((q_len, H), NEG)
        total = q.new_zeros(q_len, H)
        acc = q.new_zeros(q_len, H, Dv)
        first = self.first_key(q_len, kv_len) // n
        last = -(-kv_len // n)
        for tile in range(first, last):
            block = int(plan.table[row, tile])
            width = min(n, kv_len - tile * n)
            k = self.page(kv, kv.k, block)[:width]
            v = self.page(kv, kv.v, block)[:width]
            k, v = self.scaled(layer, k, v)
            distance = tile * n + torch.arange(width)[None, :] - q_pos[:, None]
            s = self.scores(layer, q, k, distance, scale)
            new_top = torch.maximum(top, s.amax(-1))
            safe = torch.where(new_top == NEG, 0.0, new_top)
            shrink = torch.exp(top - safe)
            weights = torch.exp(s - safe[..., None])
            total = total * shrink + weights.sum(-1)
            acc = acc * shrink[..., None] + self.values(weights, v)
            top = new_top
        safe = torch.where(top == NEG, 0.0, top)
        lse = safe + torch.log(total)
        if layer.sinks is not None:
            total, acc = self.with_sink(layer.sinks, top, total, acc)
        return acc / torch.where(total > 0, total, 1.0)[..., None], lse

    def with_sink(
        self, sinks: torch.Tensor, top: torch.Tensor, total: torch.Tensor, acc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the sink's logit to the denominator once, at a common maximum."""
        sink = sinks.float()[None, :]
        high = torch.maximum(top, sink)
        shrink = torch.exp(top - high)
        return total * shrink + torch.exp(sink - high), acc * shrink[..., None]


class SplitKernel(HostKernel):
    """Parts of the keys each by itself, merged by their LSE."""

    whole_rows = False
    part: ClassVar[int] = 48

    def one_row(
        self, plan: Any, layer: LayerArgs, q: torch.Tensor, kv: Any, row: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.spec
        q_len, kv_len = q.shape[0], plan.lens[row]
        q_pos = kv_len - q_len + torch.arange(q_len)
        outs, lses = [], []
        first = self.first_key(q_len, kv_len)
        for begin in range(first, kv_len, self.part):
            end = min(kv_len, begin + self.part)
            k, v = self.read(kv, layer, plan.table[row], begin, end)
            distance = torch.arange(begin, end)[None, :] - q_pos[:, None]
            s = self.scores(layer, q, k, distance, scale)
            lse = torch.logsumexp(s, -1)
            weights = torch.exp(s - torch.where(lse == NEG, 0.0, lse)[..., None])
            outs.append(self.values(weights, v))
            lses.append(lse)
        if not outs:
            return q.new_zeros(q_len, spec.num_heads, spec.head_dim_v), q.new_full((q_len, spec.num_heads), NEG)
        return self.merge(layer, torch.stack(outs), torch.stack(lses))

    def merge(self, layer: LayerArgs, outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """outs [P, Q, H, Dv], lses [P, Q, H] -> merged."""
        lse = torch.logsumexp(lses, 0)
        total = lse
        if layer.sinks is not None:
            total = torch.logaddexp(lse, layer.sinks.float()[None, :])
        share = torch.exp(lses - torch.where(total == NEG, 0.0, total))
        return (outs * share[..., None]).sum(0), lse


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over two disjoint sets of keys."""
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == NEG, 0.0, lse)
    share_a = torch.exp(lse_a - base)[..., None]
    share_b = torch.exp(lse_b - base)[..., None]
    part_a = torch.where(share_a > 0, out_a.float() * share_a, 0.0)
    part_b = torch.where(share_b > 0, out_b.float() * share_b, 0.0)
    return (part_a + part_b).to(out_a.dtype), lse


def copy_blocks(caches: Any, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy blocks ``source`` onto ``target`` in every plane of every layer."""
    for cache in caches:
        for plane in cache.planes.values():
            held = plane[source].clone()
            plane[target] = held
