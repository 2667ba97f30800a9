"""One attention layer inside vLLM."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from dougong.hal import NHD, AttentionSpec, LayerArgs, LayerCache
from dougong_vllm.batch import split_cache
from dougong_vllm.sharing import ranks

__all__ = ["DougongAttentionImpl"]


class DougongAttentionImpl(AttentionImpl):  # type: ignore[misc]
    """Writes the step's keys and values into vLLM's cache and attends over it.

    Raises:
        NotImplementedError: in the constructor, for what vLLM's selection cannot ask beforehand.
    """

    # Ranks that share a sequence while it decodes merge by LSE (`sharing`); in prefill vLLM refuses it.
    supports_dcp = True
    supports_pcp = False
    can_return_lse_for_decode = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        use_alibi_sqrt: bool = False,
        **others: Any,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"attention type {attn_type}: dougong's backend is for decoders")
        if use_alibi_sqrt:
            raise NotImplementedError("ALiBi with square roots: dougong's kernels have the linear one")
        unknown = sorted(name for name, value in others.items() if value not in (None, False, -1))
        if unknown:
            raise NotImplementedError(f"dougong's attention backend knows nothing of {', '.join(unknown)}")
        if ranks()[0] > 1:
            asked = {"a sliding window": sliding_window, "ALiBi": alibi_slopes, "attention sinks": sinks}
            asked["the cache of another layer"] = kv_sharing_target_layer_name
            wrong = [name for name, value in asked.items() if value is not None]
            if (num_kv_heads or num_heads) != 1:
                wrong.append(f"{num_kv_heads or num_heads} kv heads per rank")
            if wrong:
                raise NotImplementedError(
                    f"{', '.join(wrong)} with decode_context_parallel_size={ranks()[0]}: dougong's backend shares "
                    "sequences of layers with one kv head per rank and plain causal attention; set it to 1"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.shares_cache = kv_sharing_target_layer_name is not None
        self.sinks = sinks
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=head_size,
            scale=self.scale,
            window=sliding_window,
            softcap=logits_soft_cap or None,
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            dtype=get_current_vllm_config().model_config.dtype,
        )
        self.kind = -1
        """Which of its builder's kinds of layers it is; the builder says so when it is made."""
        self.args: LayerArgs | None = None
        self.cache: tuple[torch.Tensor, LayerCache] | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, K, D], kv_cache [blocks, K, N, 2·D], output [T, H·D] or [T, H, D]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("dougong's attention backend does not quantise its output")
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        args, cache = self.args or self._layer(query.device), self._planes(kv_cache)
        kernel, plan = attn_metadata.kinds[self.kind]
        padded = query.shape[0]
        if not self.shares_cache and key is not None:
            written = attn_metadata.num_actual_tokens
            if written != padded:
                key, value = key[:written], value[:written]
            kernel.write(args, key, value, cache, attn_metadata.slots)
        q = query if query.dim() == 3 else query.view(padded, self.num_heads, self.head_size)
        out = output if output.dim() == 3 else output.view(padded, self.num_heads, self.head_size)
        tokens = attn_metadata.batch.num_tokens
        if tokens != padded:
            q, out = q[:tokens], out[:tokens]
        if attn_metadata.shared is not None:
            attn_metadata.shared.attend(self.spec, args, q, key[:tokens], value[:tokens], cache, out)
        else:
            kernel.run(plan, args, q, cache, out=out)
        return output

    def _layer(self, device: torch.device) -> LayerArgs:
        to = {"device": device, "dtype": torch.float32}
        self.args = LayerArgs(
            sinks=None if self.sinks is None else self.sinks.detach().to(**to),
            slopes=None if self.slopes is None else self.slopes.to(**to),
        )
        return self.args

    def _planes(self, kv_cache: torch.Tensor) -> LayerCache:
        """vLLM's cache of this layer as one of ours, made once per tensor: vLLM may allocate anew after profiling."""
        known = self.cache
        if known is None or known[0].data_ptr() != kv_cache.data_ptr() or known[0].shape != kv_cache.shape:
            k, v = split_cache(kv_cache, self.head_size)
            known = kv_cache, LayerCache({"k": k, "v": v}, NHD, kv_cache.shape[2], self.spec)
            self.cache = known
        return known[1]
