"""The one place that imports attention libraries. Each function gives operators, or raises ImportError with what does
not fit."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["FLASH", "FlashLibrary", "flash", "flashinfer", "missing", "varlen"]

_ALIAS = "dougong_cuda._vllm_flash_attn"
#: Import names of packages that bring FlashAttention with small pages, preferred first.
FLASH = ("vllm", "flash_attn_interface")
_INSTALL = {
    "flash": "FlashAttention with pages of 16 tokens: install vllm, or FlashAttention 3 (flash_attn_interface). "
    "flash-attn 2 pages in 256 tokens and is not used",
    "flashinfer": "pip install flashinfer-python",
}


@dataclass(frozen=True)
class FlashLibrary:
    """FlashAttention of one package. ``generation`` 2 or 3; ``paged`` and ``ragged`` take the arguments of
    ``_vllm_call``, and give (out, LSE [H, T])."""

    package: str
    generation: int
    paged: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    ragged: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def missing(what: str) -> str:
    """Why a library ("flash", "flashinfer") cannot be used, found without importing it; '' if it is there."""
    if what == "flash":
        there = find_spec("flash_attn_interface") is not None or find_spec("vllm") is not None
    else:
        there = find_spec(what) is not None
    return "" if there else f"not installed ({_INSTALL[what]})"


@lru_cache(maxsize=4)
def flash(capability: tuple[int, int]) -> FlashLibrary:
    """The best FlashAttention for a device of this compute capability: 3 on 9.x, else 2."""
    reasons = []
    for name, make in zip(FLASH, (_vllm, _upstream)):
        try:
            return make(capability)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise ImportError("; ".join(reasons))


def _vllm(capability: tuple[int, int]) -> FlashLibrary:
    module = _vllm_interface()
    generation = 3 if capability[0] == 9 and module.FA3_AVAILABLE else 2
    if generation == 2 and not (module.FA2_AVAILABLE and capability >= (8, 0)):
        raise ImportError(
            f"no kernels for compute capability {capability[0]}.{capability[1]} "
            f"({module.FA2_UNAVAILABLE_REASON or 'FlashAttention 2 needs 8.0'})"
        )
    call = module.flash_attn_varlen_func

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        cu_q: torch.Tensor,
        max_q: int,
        max_k: int,
        cu_k: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
        scale: float,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        lse: bool,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = call(
            q, k, v, max_seqlen_q=max_q, cu_seqlens_q=cu_q, max_seqlen_k=max_k, cu_seqlens_k=cu_k, seqused_k=kv_len,
            softmax_scale=scale, causal=causal, window_size=list(window), softcap=softcap, block_table=table,
            return_softmax_lse=lse, out=out, fa_version=generation,
        )  # fmt: skip
        return (found[0], found[1]) if lse else (found, None)

    return FlashLibrary("vllm", generation, attend, attend)


def _vllm_interface() -> Any:
    """The module with vLLM's FlashAttention, without vLLM itself, whose import takes many seconds."""
    known = sys.modules.get("vllm.vllm_flash_attn.flash_attn_interface")
    if known is not None:
        return known
    found = find_spec("vllm")
    folder = Path((found.submodule_search_locations or [""])[0] if found is not None else "") / "vllm_flash_attn"
    if not (folder / "flash_attn_interface.py").is_file():
        raise ImportError("not installed" if found is None else "this build brings no FlashAttention")
    package = ModuleType(_ALIAS)
    package.__path__ = [str(folder)]
    sys.modules[_ALIAS] = package
    return _load(f"{_ALIAS}.flash_attn_interface")


def _upstream(capability: tuple[int, int]) -> FlashLibrary:
    if capability[0] != 9:
        raise ImportError(f"FlashAttention 3 is for compute capability 9.x, not {capability[0]}.{capability[1]}")
    module = _load("flash_attn_interface")
    with_cache, varlen_func = module.flash_attn_with_kvcache, module.flash_attn_varlen_func

    def paged(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_q: torch.Tensor, max_q: int, max_k: int,
        kv_len: torch.Tensor, table: torch.Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float,
        lse: bool, out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        found, sums, *_ = with_cache(
            q, k, v, cache_seqlens=kv_len, page_table=table, cu_seqlens_q=cu_q, max_seqlen_q=max_q,
            softmax_scale=scale, causal=causal, window_size=window, softcap=softcap, return_softmax_lse=True,
        )  # fmt: skip
        return found, sums

    def ragged(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_q: torch.Tensor, max_q: int, max_k: int,
        cu_k: torch.Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float, lse: bool,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        options: dict[str, Any] = {"return_attn_probs": True} if _has(varlen_func, "return_attn_probs") else {}
        found = varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal, window_size=window, softcap=softcap,
            **options,
        )  # fmt: skip
        return (found[0], found[1]) if isinstance(found, tuple) else (found, None)

    return FlashLibrary("flash_attn_interface", 3, paged, ragged)


@lru_cache(maxsize=1)
def flashinfer() -> Any:
    """The module ``flashinfer``, 0.6 or newer."""
    module = _load("flashinfer")
    for name in (
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
    ):
        if not hasattr(module, name):
            raise ImportError(f"flashinfer {getattr(module, '__version__', '')} has no {name}; 0.6 has")
    return module


@dataclass(frozen=True)
class Varlen:
    """torch's own attention over ragged rows, and which arguments this torch's takes."""

    call: Callable[..., Any]
    scale: bool
    window: bool
    gqa: bool


@lru_cache(maxsize=1)
def varlen() -> Varlen:
    """``torch.nn.attention.varlen.varlen_attn``, of torch 2.10 and newer."""
    module = _load("torch.nn.attention.varlen")
    call = module.varlen_attn
    return Varlen(call, _has(call, "scale"), _has(call, "window_size"), _has(call, "enable_gqa"))


def _has(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise
    except Exception as error:  # a library built for another torch or CUDA: OSError, RuntimeError, AttributeError
        raise ImportError(f"{name} does not fit torch {torch.__version__}: {type(error).__name__}: {error}") from error
