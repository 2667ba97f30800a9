"""Stands where SGLang stands: the modules, names and fields of SGLang 0.5.17 that the plugin touches."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

__all__ = ["Mode", "forward", "install", "layer", "runner"]


@dataclass
class KVWriteLoc:
    loc: torch.Tensor


class Mode:
    def __init__(self, decode: bool) -> None:
        self.decode = decode

    def is_decode_or_idle(self) -> bool:
        return self.decode


class MHATokenToKVPool:
    """Token places of one layer; place 0 is for padding."""

    def __init__(
        self, size: int, heads: int, dim: int, v_dim: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.k, self.v = (torch.full((size, heads, one), float("nan"), dtype=dtype) for one in (dim, v_dim or dim))

    def set_kv_buffer(self, layer: Any, where: KVWriteLoc, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[where.loc], self.v[where.loc] = k, v

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v


def runner(pool: Any, req_to_token: torch.Tensor, page: int, **options: Any) -> Any:
    return SimpleNamespace(
        device="cpu",
        page_size=page,
        use_mla_backend=options.pop("mla", False),
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=options.pop("allocator", SimpleNamespace()),
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token, size=req_to_token.shape[0]),
        model_config=SimpleNamespace(context_len=req_to_token.shape[1], is_encoder_decoder=False),
        server_args=SimpleNamespace(
            **{"kv_cache_dtype": "auto", "speculative_algorithm": None, "chunked_prefill_size": 64, **options}
        ),
    )


def layer(heads: int, kv_heads: int, dim: int, **options: Any) -> Any:
    return SimpleNamespace(
        **{
            "tp_q_head_num": heads, "tp_k_head_num": kv_heads, "qk_head_dim": dim, "v_head_dim": dim,
            "scaling": dim**-0.5, "layer_id": 0, "logit_cap": 0.0, "sliding_window_size": -1,
            "is_cross_attention": False, "logit_capping_method": "tanh", "xai_temperature_len": -1,
            "attn_type": SimpleNamespace(value="decoder"), "k_scale": None, "v_scale": None, **options,
        }
    )  # fmt: skip


def forward(rows: list[int], q_lens: list[int], kv_lens: list[int], req_to_token: torch.Tensor, decode: bool) -> Any:
    """A ForwardBatch as the scheduler makes it."""
    places = [
        int(req_to_token[row, p]) for row, q, kv in zip(rows, q_lens, kv_lens, strict=True) for p in range(kv - q, kv)
    ]
    return SimpleNamespace(
        batch_size=len(rows),
        forward_mode=Mode(decode),
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(kv_lens),
        seq_lens_cpu=torch.tensor(kv_lens),
        extend_seq_lens=None if decode else torch.tensor(q_lens),
        extend_seq_lens_cpu=None if decode else q_lens,
        out_cache_loc=torch.tensor(places),
    )


def install(monkeypatch: Any, version: str = "0.5.17", registry: bool = True) -> dict[str, Any]:
    """Put the modules in place; returns the registry."""
    backends: dict[str, Any] = {}
    choices = ["triton"]
    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.srt": {},
        "sglang.srt.layers": {},
        "sglang.srt.layers.attention": {},
        "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": object},
        "sglang.srt.mem_cache": {},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc},
        "sglang.srt.layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": lambda name: lambda make: backends.setdefault(name, make),
        },
        "sglang.srt.server_args": {
            "ATTENTION_BACKEND_CHOICES": choices,
            "add_attention_backend_choices": choices.extend,
        },
    }
    if not registry:
        contents["sglang.srt.layers.attention.attention_registry"] = {}
    for name, values in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dougong_sglang.backend", raising=False)
    return {"backends": backends, "choices": choices}
