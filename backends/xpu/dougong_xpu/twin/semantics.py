"""What the operators compute, in plain torch, float32 inside. Arguments have passed the rules.

Each is an operator of its own for the CPU: the simulated device runs it on its memory and records it in graphs.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from dougong_xpu.twin.refusal import require

__all__ = ["register"]

_SCHEMAS = {
    "attend": "attend(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor? cu_k, Tensor? used, Tensor? table,"
    " int max_q, int max_k, float scale, bool causal, int left, int right, Tensor? k_scale, Tensor? v_scale,"
    " bool heads_out, Tensor(a!) out) -> ()",
    "store": "store(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor? k_scale,"
    " Tensor? v_scale, bool heads_out) -> ()",
}


def register(inner: torch.library.Library) -> None:
    for name, schema in _SCHEMAS.items():
        inner.define(schema)
        inner.impl(name, globals()[f"_{name}"], "CPU")


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor | None,
    used: torch.Tensor | None, table: torch.Tensor | None, max_q: int, max_k: int, scale: float, causal: bool,
    left: int, right: int, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, heads_out: bool,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Rows of ``cu_q`` against pages (``table``, ``used``) or dense keys (``cu_k``).

    A hidden key's weight is 0 and still multiplies its value; a query that sees nothing gets NaN, since no document
    says what it gets.
    """
    starts = cu_q.tolist()
    ends = None if cu_k is None else cu_k.tolist()
    for row, (begin, end) in enumerate(pairwise(starts)):
        require(end - begin <= max_q, "attention", f"row {row} has more queries than max_seqlen_q={max_q}")
        if end == begin:
            continue
        if table is not None and used is not None:
            length, block = int(used[row]), k.shape[2 if heads_out else 1]
            pages = table[row, : -(-length // block)].long()
            inside = bool(((pages >= 0) & (pages < k.shape[0])).all())
            require(inside, "attention", f"row {row}'s block table leaves the cache")
            keys, values = (x[pages].transpose(1, 2) if heads_out else x[pages] for x in (k, v))
            keys, values = (x.reshape(-1, *x.shape[2:])[:length] for x in (keys, values))
        else:
            assert ends is not None
            length = ends[row + 1] - ends[row]
            keys, values = k[ends[row] : ends[row + 1]], v[ends[row] : ends[row + 1]]
        require(length <= max_k, "attention", f"row {row} has more keys than max_seqlen_k={max_k}")
        keys = keys.float() if k_scale is None else keys.float() * k_scale.flatten()[0]
        values = values.float() if v_scale is None else values.float() * v_scale.flatten()[0]
        ratio = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(ratio, 1), values.repeat_interleave(ratio, 1)
        scores = torch.einsum("thd,nhd->htn", q[begin:end].float(), keys) * scale
        position = torch.arange(end - begin)[:, None] + length - (end - begin)
        ahead = torch.arange(length)[None] - position
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if causal:
            hidden |= ahead > 0
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("htn,nhd->thd", weights, values).to(out.dtype)
        if not length:
            out[begin:end] = torch.nan


def _store(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, heads_out: bool,
) -> None:  # fmt: skip
    block = k_cache.shape[2 if heads_out else 1]
    require(bool((slots < k_cache.shape[0] * block).all()), "cache write", "a slot past the cache")
    used = slots >= 0
    page, place = slots[used] // block, slots[used] % block
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        value = new[used]
        if scale is not None:
            top = torch.finfo(cache.dtype).max
            value = (value.float() / scale.flatten()[0]).clamp(-top, top)
        if heads_out:
            cache[page, :, place] = value.to(cache.dtype)
        else:
            cache[page, place] = value.to(cache.dtype)
