"""The attention backend that vLLM loads: what it can do, for vLLM's selection, and its parts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.backends.utils import get_kv_cache_layout

from dougong.errors import DougongError
from dougong.hal import NHD, AttentionQuery, AttentionSpec, backend_for
from dougong_vllm.builder import DougongMetadataBuilder
from dougong_vllm.impl import DougongAttentionImpl

__all__ = ["DougongAttentionBackend"]

_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class DougongAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Paged attention of dougong's kernels. All that vLLM asks for and these methods do not grant, vLLM refuses."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # Quantised caches: the kernels read fp8 and int8, but nothing of it was tried inside vLLM.
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[DougongAttentionImpl]:
        return DougongAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DougongMetadataBuilder]:
        return DougongMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Physical order of the dimensions. The kernels take any, so vLLM's own choice (connectors need it) is met."""
        layout = get_kv_cache_layout()
        if layout == "NHD":
            return (1, 0, 3, 2, 4) if include_num_layers_dimension else (0, 2, 1, 3)
        if layout == "HND":
            return (1, 2, 0, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)
        raise ValueError(f"KV cache layout {layout!r}: dougong reads NHD and HND")

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 16 <= head_size <= 256 and head_size % 8 == 0

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Ask the kernels themselves: why none of them does this, as one more of vLLM's reasons; None if one does."""
        from vllm.platforms import current_platform

        kept = _CACHE_DTYPES.get(kv_cache_dtype or "auto", dtype)
        if kept != dtype:
            return f"dougong: a KV cache in {kept} beside a model in {dtype}; leave --kv-cache-dtype at auto"
        device = torch.device(current_platform.device_type)
        spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=head_size, sinks=has_sink, dtype=dtype)
        try:
            query = AttentionQuery(spec=spec, layout=NHD, block_size=block_size or 16, strided=True)
            backend_for(device).choose_attention(query)
        except DougongError as error:
            return f"dougong: {error}"
        return None
