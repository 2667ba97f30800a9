"""The attention libraries by their signatures and rules, with plain torch behind them."""

from __future__ import annotations

import math
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

from dougong_cuda import sdk

__all__ = ["calls", "install", "remove"]

#: What was called, in order.
calls: list[str] = []

HALF = (torch.float16, torch.bfloat16)
_CACHED = (sdk.flash, sdk.flashinfer, sdk.varlen)
NAMES = ("vllm", "vllm.vllm_flash_attn.flash_attn_interface", "flash_attn_interface", "flashinfer")


def install(*names: str) -> None:
    """Make ``import`` give the twins of these packages, and no other's."""
    remove()
    for name in names:
        if name == "vllm":
            _module("vllm")
            flash = _module("vllm.vllm_flash_attn.flash_attn_interface")
            flash.flash_attn_varlen_func = flash_attn_varlen_func
            flash.FA2_AVAILABLE = flash.FA3_AVAILABLE = True
            flash.FA2_UNAVAILABLE_REASON = None
        elif name == "flash_attn_interface":
            module = _module(name)
            module.flash_attn_with_kvcache = flash_attn_with_kvcache
            module.flash_attn_varlen_func = upstream_varlen_func
        else:
            module = _module("flashinfer")
            for wrapper in (
                BatchDecodeWithPagedKVCacheWrapper,
                BatchPrefillWithPagedKVCacheWrapper,
                BatchPrefillWithRaggedKVCacheWrapper,
            ):
                setattr(module, wrapper.__name__, wrapper)


def remove() -> None:
    """Forget every twin, and what the backend found in them."""
    for name in NAMES:
        sys.modules.pop(name, None)
    for found in _CACHED:
        found.cache_clear()


def _module(name: str) -> Any:
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = module
    return module


def need(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"twin: {rule}")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: q [T, H, D], k and v [N, K, D]; keys from ``left`` before a query to ``right`` after it, -1: all. Gives
    out [T, H, D] and natural LSE [H, T]; of a query that sees nothing, NaN and +inf."""
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = torch.einsum("thd,nhd->htn", q.float(), k) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    ahead = torch.arange(k.shape[0])[None] - (torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0])
    if right >= 0:
        scores = scores.masked_fill(ahead > right, -torch.inf)
    if left >= 0:
        scores = scores.masked_fill(ahead < -left, -torch.inf)
    sums = torch.logsumexp(scores, -1) if k.shape[0] else scores.new_full(scores.shape[:2], -torch.inf)
    out = torch.einsum("htn,nhd->thd", scores.softmax(-1), v).to(q.dtype)
    return out, sums.masked_fill(sums == -torch.inf, torch.inf)


def _pages(plane: torch.Tensor, row: torch.Tensor, length: int) -> torch.Tensor:
    place = torch.arange(length)
    return plane[row[place // plane.shape[1]].long(), place % plane.shape[1]]


def _rows(
    q: Any, k: Any, v: Any, cu_q: Any, keys: list[tuple[Any, Any]], options: tuple[Any, ...], out: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    need(cu_q.dtype == torch.int32 and cu_q.tolist()[0] == 0 and cu_q.tolist()[-1] == len(q), "cu_seqlens_q covers q")
    for (a, b), (one, other) in zip(pairwise(cu_q.tolist()), keys, strict=True):
        out[a:b], lse[:, a:b] = attend(q[a:b], one, other, *options)
    return out, lse


# -- FlashAttention, as vLLM 0.26 packages it ------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, max_seqlen_q: Any, cu_seqlens_q: Any, max_seqlen_k: Any, cu_seqlens_k: Any = None,
    seqused_k: Any = None, q_v: Any = None, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: list[int] | None = None, softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Any = None, return_softmax_lse: bool = False, out: Any = None,
    scheduler_metadata: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    num_splits: int = 0, output_scale: Any = None, fa_version: int = 2, s_aux: Any = None, cp_world_size: int = 1,
    cp_rank: int = 0, cp_tot_seqused_k: Any = None, mask_mod: Any = None, aux_tensors: Any = None,
    dynamic_causal: Any = None,
) -> Any:  # fmt: skip
    calls.append(f"flash_attn_varlen_func {fa_version}")
    need((cu_seqlens_k is None) != (seqused_k is None), "one of cu_seqlens_k and seqused_k")
    need(block_table is None or seqused_k is not None, "seqused_k with block_table")
    need(q.dtype in HALF and k.dtype == v.dtype == q.dtype, "fp16 or bf16 alike")
    need(all(one.stride(-1) == 1 for one in (q, k, v)), "contiguous last dimensions")
    left, right = (-1, -1) if window_size is None else window_size
    if block_table is not None:
        need(block_table.dtype == torch.int32 and seqused_k.dtype == torch.int32, "int32")
        need(k.shape[1] % 16 == 0, "pages of multiples of 16")
        lengths = seqused_k.tolist()
        keys = [(_pages(k, row, n), _pages(v, row, n)) for row, n in zip(block_table, lengths, strict=True)]
    else:
        at = cu_seqlens_k.tolist()
        lengths = [b - a for a, b in pairwise(at)]
        keys = [(k[a:b], v[a:b]) for a, b in pairwise(at)]
    need(max(lengths) <= max_seqlen_k, "max_seqlen_k bounds the keys")
    need(int(cu_seqlens_q.diff().max()) <= max_seqlen_q, "max_seqlen_q bounds the queries")
    options = softmax_scale or q.shape[-1] ** -0.5, softcap, left, 0 if causal else right
    out, lse = _rows(q, k, v, cu_seqlens_q, keys, options, out)
    return (out, lse) if return_softmax_lse else out


# -- FlashAttention 3 upstream ---------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None, rotary_cos: Any = None,
    rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
    page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: Any = None,
    rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1), attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Any = None, num_splits: int = 0,
    pack_gqa: Any = None, sm_margin: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    calls.append("flash_attn_with_kvcache")
    need(cache_seqlens.dtype == page_table.dtype == torch.int32, "int32")
    need(q.dtype in HALF and k_cache.dtype == q.dtype, "fp16 or bf16 alike")
    keys = [
        (_pages(k_cache, row, n), _pages(v_cache, row, n))
        for row, n in zip(page_table, cache_seqlens.tolist(), strict=True)
    ]
    options = softmax_scale or q.shape[-1] ** -0.5, softcap, window_size[0], 0 if causal else window_size[1]
    out, lse = _rows(q, k_cache, v_cache, cu_seqlens_q, keys, options, None)
    return (out, lse, None, None) if return_softmax_lse else out


def upstream_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
    q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
    deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    calls.append("upstream_varlen_func")
    keys = [(k[a:b], v[a:b]) for a, b in pairwise(cu_seqlens_k.tolist())]
    options = softmax_scale or q.shape[-1] ** -0.5, softcap, window_size[0], 0 if causal else window_size[1]
    out, lse = _rows(q, k, v, cu_seqlens_q, keys, options, None)
    return (out, lse) if return_attn_probs else out


# -- FlashInfer 0.6 --------------------------------------------------------------------------------------------


class _Wrapper:
    """What the wrappers share: a workspace, a layout, and a plan that must come before a run."""

    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD", **options: Any) -> None:
        need(float_workspace_buffer.dtype in (torch.uint8, torch.int8), "a workspace of bytes")
        need(kv_layout in ("NHD", "HND"), "NHD or HND")
        self._hnd = kv_layout == "HND"
        self._planned: Any = None

    def _plan(self, indptr: Any, heads: tuple[int, int, int], options: dict[str, Any]) -> None:
        need(indptr.dtype == torch.int32, "int32")
        need(options["q_data_type"] == options["kv_data_type"] and options["q_data_type"] in HALF, "fp16 or bf16")
        need(heads[0] % heads[1] == 0 and heads[2] in (64, 128, 256), "heads")

    def _answer(self, q: Any, keys: Any, indptr: list[int], plan: Any, out: Any, return_lse: bool) -> Any:
        need(q.is_contiguous() and out.is_contiguous(), "contiguous q and out")
        heads, causal, left, options = plan
        need(q.shape[1:] == (heads[0], heads[2]), "q as planned")
        lse = torch.empty(q.shape[:2])
        for (a, b), (k, v) in zip(pairwise(indptr), keys, strict=True):
            cap = options["logits_soft_cap"]
            out[a:b], sums = attend(q[a:b], k, v, options["sm_scale"], cap, left, 0 if causal else -1)
            lse[a:b] = sums.T / math.log(2.0)
        return (out, lse) if return_lse else out

    def _keys(self, paged: Any, indptr: Any, indices: Any, last: Any) -> list[tuple[Any, Any]]:
        found = []
        for row, (a, b) in enumerate(pairwise(indptr.tolist())):
            planes = []
            for plane in paged:
                plane = plane.transpose(1, 2) if self._hnd else plane
                need(b > a, "a row of no pages")
                length = (b - a - 1) * plane.shape[1] + int(last[row])
                planes.append(_pages(plane, indices[a:b], length))
            found.append((planes[0], planes[1]))
        return found


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int,
        page_size: int, **options: Any,
    ) -> None:  # fmt: skip
        calls.append("decode.plan")
        heads = num_qo_heads, num_kv_heads, head_dim
        self._plan(indptr, heads, options)
        need(int(last_page_len.min()) >= 1 and int(last_page_len.max()) <= page_size, "tokens in the last page")
        self._planned = (heads, False, -1, options), indptr, indices, last_page_len

    def run(self, q: Any, paged_kv_cache: Any, *, out: Any = None, lse: Any = None, return_lse: bool = False) -> Any:
        calls.append("decode.run")
        plan, indptr, indices, last = self._planned
        keys = self._keys(paged_kv_cache, indptr, indices, last)
        return self._answer(q, keys, list(range(len(keys) + 1)), plan, out, return_lse)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, qo_indptr: Any, paged_kv_indptr: Any, paged_kv_indices: Any, paged_kv_last_page_len: Any,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        calls.append("prefill.plan")
        heads = num_qo_heads, num_kv_heads, head_dim_qk
        self._plan(paged_kv_indptr, heads, options)
        need(qo_indptr.dtype == torch.int32 and int(qo_indptr[0]) == 0, "qo_indptr")
        plan = heads, causal, -1, options
        self._planned = plan, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len

    def run(self, q: Any, paged_kv_cache: Any, *, out: Any = None, lse: Any = None, return_lse: bool = False) -> Any:
        calls.append("prefill.run")
        plan, qo, indptr, indices, last = self._planned
        keys = self._keys(paged_kv_cache, indptr, indices, last)
        return self._answer(q, keys, qo.tolist(), plan, out, return_lse)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(
        self, qo_indptr: Any, kv_indptr: Any, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, *,
        causal: bool = False, window_left: int = -1, **options: Any,
    ) -> None:  # fmt: skip
        calls.append("ragged.plan")
        heads = num_qo_heads, num_kv_heads, head_dim_qk
        self._plan(kv_indptr, heads, options)
        self._planned = (heads, causal, window_left, options), qo_indptr, kv_indptr

    def run(self, q: Any, k: Any, v: Any, *, out: Any = None, lse: Any = None, return_lse: bool = False) -> Any:
        calls.append("ragged.run")
        plan, qo, indptr = self._planned
        keys = [(k[a:b], v[a:b]) for a, b in pairwise(indptr.tolist())]
        return self._answer(q, keys, qo.tolist(), plan, out, return_lse)
