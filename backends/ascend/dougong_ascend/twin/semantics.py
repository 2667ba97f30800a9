"""What the operators compute, in plain torch, float32 inside. Arguments have passed the rules."""

from __future__ import annotations

import torch

__all__ = ["attend", "gather_pages"]


def gather_pages(
    cache: torch.Tensor, table: torch.Tensor, kv_len: int, block: int, heads: int, kind: str
) -> torch.Tensor:
    """One row's keys from a paged plane -> [kv_len, heads, D].

    ``kind``: "merged" [blocks, N, K·D], "heads" [blocks, K, N, D], "tiled" [blocks, K·D/16, N, 16], "nz" [blocks, K,
    D/16, N, 16].
    """
    pages = cache[table[: -(-kv_len // block)].to(torch.int64)]
    if kind == "heads":
        pages = pages.transpose(1, 2)
    elif kind == "nz":
        pages = pages.permute(0, 3, 1, 2, 4)
    elif kind == "tiled":
        pages = pages.transpose(1, 2).flatten(2)
    return pages.reshape(-1, heads, pages.numel() // (pages.shape[0] * block * heads))[:kv_len]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
    fix_blind: bool,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [S, H, D], k [L, K, D], v [L, K, Dv], hidden [S, L] bool (True: not seen) -> out [S, H, Dv], lse [S, H].

    As on hardware, a hidden key's weight is 0 and still multiplies its value: NaN there spoils the answer. A query
    that sees nothing gives NaN (the documents promise nothing), or 0 where the call asks to set such rows right; its
    LSE is +inf, which the contract's is not.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    k = k.float().repeat_interleave(heads // kv_heads, dim=1)
    v = v.float().repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("shd,lhd->hsl", q.float(), k) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.float()[:, None].expand_as(lse))
    out = torch.einsum("hsl,lhd->shd", torch.exp(scores - total[..., None]), v)
    if hidden is not None:
        blind = hidden.all(dim=-1)
        out[blind] = 0.0 if fix_blind else torch.nan
        lse[:, blind] = torch.inf
    return out, lse.transpose(0, 1)
