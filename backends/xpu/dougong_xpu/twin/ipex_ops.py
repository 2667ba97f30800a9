"""intel-extension-for-pytorch 2.8: ``ipex.llm.modules.PagedAttention`` by its documents. Its operators have no names of
their own here: the class is what users call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dougong_xpu.twin.refusal import require

__all__ = ["MODULES", "PagedAttention", "register"]


def register() -> list[torch.library.Library]:
    """The class below needs no operators; torch must be taken for the one that the library was made for."""
    from dougong_xpu import sdk

    sdk.torch_minor = lambda: (2, 8)  # type: ignore[assignment]
    return []


def _common(name: str, q: Any, k: Any, v: Any, table: Any) -> None:
    require(q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype, name, "fp16 or bf16, alike")
    require(q.is_contiguous() and k.is_contiguous() and v.is_contiguous(), name, "contiguous queries and cache")
    require(k.dim() == 4 and k.shape[3] == q.shape[2], name, "a cache [blocks, heads, block, D]")
    require(table.dtype == torch.int32, name, "an int32 block table")


class PagedAttention:
    """The class methods that this backend calls."""

    @classmethod
    def reshape_and_cache(
        cls, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, kv_cache_dtype: str = "auto",
        k_scale: float = 1.0, v_scale: float = 1.0,
    ) -> None:  # fmt: skip
        require(key.is_contiguous() and value.is_contiguous(), "reshape_and_cache", "contiguous key and value")
        require(key_cache.dtype == key.dtype and kv_cache_dtype == "auto", "reshape_and_cache", "a cache like the keys")
        torch.ops.dougong_xpu_twin.store(key, value, key_cache, value_cache, slot_mapping, None, None, True)

    @classmethod
    def single_query_cached_kv_attention(
        cls, out: Any, query: Any, key_cache: Any, value_cache: Any, head_mapping: Any, scale: float, block_tables: Any,
        context_lens: Any, block_size: int, max_context_len: int, alibi_slopes: Any = None, window_size: int = -1,
        k_scale: float = 1.0, v_scale: float = 1.0, softcap: float = -1.0,
    ) -> None:  # fmt: skip
        name = "single_query_cached_kv_attention"
        _common(name, query, key_cache, value_cache, block_tables)
        require(context_lens.dtype == torch.int32 and head_mapping.dtype == torch.int32, name, "int32 lengths, mapping")
        require(head_mapping.shape[0] == query.shape[1], name, "one kv head per query head")
        require(key_cache.shape[2] == block_size, name, "block_size is the cache's")
        require(alibi_slopes is None and window_size < 0, name, "ALiBi and windows are not modelled")
        cu_q = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device)
        torch.ops.dougong_xpu_twin.attend(
            query, key_cache, value_cache, cu_q, None, context_lens, block_tables, 1, max_context_len, scale, False,
            -1, -1, None, None, True, out,
        )  # fmt: skip

    @classmethod
    def flash_attn_varlen_func(
        cls, out: Any, query: Any, key_cache: Any, value_cache: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any,
        max_seqlen_q: int, max_seqlen_kv: int, scale: float, is_causal: bool, block_tables: Any,
        alibi_slopes: Any = None, window_size_left: int = -1, window_size_right: int = -1,
        kv_cache_dtype: str = "auto", k_scale: float = 1.0, v_scale: float = 1.0, softcap: float = -1.0,
    ) -> None:  # fmt: skip
        name = "flash_attn_varlen_func"
        _common(name, query, key_cache, value_cache, block_tables)
        require(is_causal, name, "is_causal=False is not supported yet")
        require(cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32, name, "int32 prefix sums")
        require(alibi_slopes is None and window_size_left < 0, name, "ALiBi and windows are not modelled")
        lengths = (cu_seqlens_kv[1:] - cu_seqlens_kv[:-1]).to(torch.int32)
        torch.ops.dougong_xpu_twin.attend(
            query, key_cache, value_cache, cu_seqlens_q, None, lengths, block_tables, max_seqlen_q, max_seqlen_kv,
            scale, True, -1, -1, None, None, True, out,
        )  # fmt: skip


MODULES: dict[str, dict[str, Any]] = {
    "intel_extension_for_pytorch": {
        "__version__": "2.8.10+xpu",
        "llm": SimpleNamespace(modules=SimpleNamespace(PagedAttention=PagedAttention)),
    },
}
