"""aiter's two attention operators by their signatures and rules, with plain torch behind them."""

from __future__ import annotations

import sys
import weakref
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

__all__ = ["calls", "install", "workspaces"]

#: Names of the operators called, in order.
calls: list[str] = []
#: The workspaces that were given, as far as they live.
workspaces: list[weakref.ref[torch.Tensor]] = []
_kept: list[Any] = []

_PAGED = (
    "paged_attention_v1(Tensor(a!) out, Tensor(b!) workspace_buffer, Tensor query, Tensor key_cache,"
    " Tensor value_cache, float scale, Tensor block_tables, Tensor? cu_query_lens, Tensor context_lens,"
    " int max_context_len,"
    " Tensor? alibi_slopes, str kv_cache_dtype, str kv_cache_layout, float logits_soft_cap, Tensor k_scale,"
    " Tensor v_scale, Tensor? fp8_out_scale=None, int partition_size=256, int mtp=1, int sliding_window=0) -> ()"
)


def install() -> None:
    """Make ``import aiter`` give the twin, once per process."""
    if "aiter" in sys.modules:
        return
    library = torch.library.Library("aiter", "DEF")
    library.define(_PAGED)
    library.impl("paged_attention_v1", _paged, "CPU")
    _kept.append(library)
    module: Any = ModuleType("aiter")
    module.__spec__ = ModuleSpec("aiter", None)
    module.flash_attn_varlen_func = _varlen
    sys.modules["aiter"] = module


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"aiter twin: {rule}")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: float, causal: bool) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = torch.einsum("thd,nhd->htn", q.float(), k) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if causal:
        ahead = torch.arange(k.shape[0])[None] - (torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0])
        scores = scores.masked_fill(ahead > 0, -torch.inf)
    return torch.einsum("htn,nhd->thd", scores.softmax(-1).nan_to_num(0.0), v).to(q.dtype)


def _paged(
    out: Any, workspace: Any, q: Any, k: Any, v: Any, scale: float, table: Any, cu_q: Any, lengths: Any, longest: int,
    alibi: Any, kv_dtype: str, layout: str, cap: float, k_scale: Any, v_scale: Any, fp8_out: Any = None,
    partition: int = 256, mtp: int = 1, window: int = 0,
) -> None:  # fmt: skip
    calls.append("paged_attention_v1")
    workspaces.append(weakref.ref(workspace))
    rows, heads, dim = q.shape
    _need(q.dtype in (torch.float16, torch.bfloat16) and k.dtype == q.dtype, "fp16 or bf16, cache alike")
    _need(kv_dtype == "auto" and layout == "NHD" and cu_q is None and alibi is None, "this use only")
    _need(table.dtype == torch.int32 and lengths.dtype == torch.int32, "int32 tables and lengths")
    _need(table.shape[0] == rows == lengths.shape[0], "one table row and length per query")
    _need(k.shape[1] in (16, 32) and dim in (64, 128, 256), "blocks of 16 or 32, heads of 64, 128, 256")
    _need(table.shape[1] * k.shape[1] >= longest, "the table holds the longest row")
    _need(out.is_contiguous() and q.stride(2) == 1 and q.stride(1) == dim, "strides")
    _need(k_scale.dtype == v_scale.dtype == torch.float32, "scales are float32 tensors")
    parts = -(-longest // partition)
    _need(
        workspace.numel() * workspace.itemsize >= rows * heads * parts * (dim * q.itemsize + 8), "workspace too small"
    )
    for row, length in enumerate(lengths.tolist()):
        _need(length <= longest, "a row longer than the bound")
        if length == 0:
            out[row] = torch.nan  # no partition writes it
            continue
        place = torch.arange(length)
        block = table[row, place // k.shape[1]].long()
        keys, values = k[block, place % k.shape[1]], v[block, place % k.shape[1]]
        out[row] = _attend(q[row : row + 1], keys, values, scale, cap, False)[0]


def _varlen(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, min_q: int = 0, dropout_p: float = 0.0,
    softmax_scale: float | None = None, logits_soft_cap: float = 0.0, causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    calls.append("flash_attn_varlen_func")
    _need(q.is_contiguous() and k.is_contiguous() and v.is_contiguous(), "contiguous q, k and v")
    _need(cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k), "int32 prefix sums of one batch")
    q_at, k_at = cu_q.tolist(), cu_k.tolist()
    _need(q_at[0] == k_at[0] == 0 and q_at[-1] == len(q) and k_at[-1] == len(k), "prefix sums cover q and k")
    _need(max_q == max(b - a for a, b in pairwise(q_at)), "max_seqlen_q")
    _need(max_k == max(b - a for a, b in pairwise(k_at)), "max_seqlen_k")
    parts = [
        _attend(q[a:b], k[c:d], v[c:d], softmax_scale or q.shape[-1] ** -0.5, logits_soft_cap, causal)
        for a, b, c, d in zip(q_at, q_at[1:], k_at, k_at[1:])
    ]
    return torch.cat(parts)
