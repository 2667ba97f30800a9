"""Kinds of cases by name, loaded when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Execute", "find"]

#: (context, request, message, tensors): fills ``message`` (JSON) and ``tensors`` with what the backend answered.
Execute = Callable[[Any, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]], None]

_WHERE = {
    "attention": "attention:execute",
    "variants": "attention:execute_variants",
    "write": "write:execute",
    "roundtrip": "write:execute_roundtrip",
    "copy": "blocks:execute_copy",
    "convert": "blocks:execute_convert",
    "op": "ops:execute",
    "sample": "ops:execute_sample",
    "device": "device:execute",
    "graph": "graph:execute",
    "stress": "stress:execute",
    "manager": "manager:execute",
    "engine": "engine:execute",
    "needle": "attention:execute_needle",
    "perf": "perf:execute",
}


def find(kind: str) -> Execute:
    """The function that executes cases of ``kind``."""
    module, _, name = _WHERE[kind].partition(":")
    found: Execute = getattr(importlib.import_module(f"dougong_compat.execute.{module}"), name)
    return found
