"""Judging checks that the worker's side makes itself (devices, the block manager, the engine): every observation that
should hold is sent, and one that is missing counts as one that failed."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.outcome import Judgement
from dougong_compat.tolerance import Tolerance

__all__ = ["judge"]


def judge(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    """``message['checks']`` is a list of [what, held]; at least one must be there and all must hold."""
    checks = message.get("checks")
    if not checks:
        return Judgement(False, "no check was made")
    failed = [str(what) for what, held in checks if held is not True]
    return Judgement(not failed, "; ".join(failed[:3])[:500])
