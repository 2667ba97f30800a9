"""The judge of each kind of case, loaded when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dougong_compat.outcome import Judgement
from dougong_compat.tolerance import Tolerance

__all__ = ["KINDS", "find"]

Judge = Callable[[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], Tolerance], Judgement]

_WHERE = {
    "attention": "attention:judge",
    "variants": "attention:judge_variants",
    "needle": "attention:judge_needle",
    "write": "write:judge",
    "roundtrip": "write:judge_roundtrip",
    "copy": "blocks:judge_copy",
    "convert": "blocks:judge_convert",
    "op": "ops:judge",
    "sample": "sampling:judge",
    "device": "trace:judge",
    "graph": "graph:judge",
    "stress": "trace:judge",
    "manager": "trace:judge",
    "engine": "engine:judge",
}
KINDS = frozenset(_WHERE)


def find(kind: str) -> Judge:
    """The judge of cases of ``kind``."""
    module, _, name = _WHERE[kind].partition(":")
    found: Judge = getattr(importlib.import_module(f"dougong_compat.judge.{module}"), name)
    return found
