"""The one place that imports Intel's kernel libraries. Each function gives the operators, or raises ImportError with
what does not fit."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["LIBRARIES", "ipex", "missing", "sgl", "torch_minor", "vllm"]

#: Import name to what a person installs.
LIBRARIES = {
    "vllm_xpu_kernels": "vllm-xpu-kernels, built for this torch",
    "sgl_kernel": "sgl-kernel-xpu, built from its source",
    "intel_extension_for_pytorch": "intel-extension-for-pytorch 2.8 with torch 2.8",
}


def torch_minor() -> tuple[int, int]:
    """(2, 13) of 2.13.0+xpu."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def missing(library: str) -> str:
    """Why a library cannot be used, without importing it; '' if it is there."""
    if find_spec(library) is None:
        return f"{library} is not installed (it comes with {LIBRARIES[library]})"
    return ""


def vllm() -> Any:
    """``flash_attn_varlen_func``; its cache operator is ``torch.ops._C_cache_ops.reshape_and_cache_flash``."""
    module = _load("vllm_xpu_kernels.flash_attn_interface")
    if not getattr(module, "FA2_AVAILABLE", True):
        raise ImportError(f"vllm_xpu_kernels has no attention: {module.FA2_UNAVAILABLE_REASON}")
    _load("vllm_xpu_kernels._C")
    if not hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        raise ImportError("vllm_xpu_kernels is too old: it has no reshape_and_cache_flash")
    return module.flash_attn_varlen_func


def sgl() -> Any:
    """``flash_attn_with_kvcache`` with an ``out`` argument."""
    module = _load("sgl_kernel.flash_attn")
    operator = getattr(getattr(torch.ops.sgl_kernel, "fwd", None), "default", None)
    if operator is None:
        raise ImportError("sgl_kernel was built without attention (USE_FMHA=OFF), or for another device")
    if all(argument.name != "out" for argument in operator._schema.arguments):
        raise ImportError("sgl_kernel is too old: its attention does not write into a tensor that is given (out)")
    return module.flash_attn_with_kvcache


def ipex() -> Any:
    """``PagedAttention`` of intel-extension-for-pytorch 2.8, the last there is."""
    if torch_minor() != (2, 8):
        raise ImportError(
            f"intel-extension-for-pytorch ended with 2.8, for torch 2.8; this is torch {torch_minor()[0]}."
            f"{torch_minor()[1]}"
        )
    module = _load("intel_extension_for_pytorch")
    if not str(module.__version__).startswith("2.8."):
        raise ImportError(f"intel-extension-for-pytorch {module.__version__}: only 2.8 is for torch 2.8")
    return module.llm.modules.PagedAttention


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except OSError as error:  # a library built for another torch or another oneAPI
        raise ImportError(f"{name} does not fit torch {torch.__version__}: {error}") from error
