"""The ops a device needs, and the table of those chosen for it.

Each op has one functional signature; its reference in ``dougong.hal.reference`` is the definition. A plugin's
function has the same signature and may have an attribute ``supports(query, device) -> tuple[Refusal, ...]``, as
kernels' classes have: empty if it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.hal.cache import copy_blocks
from dougong.hal.layout import KVLayout
from dougong.hal.reference import ops as reference
from dougong.hal.reference import sampling
from dougong.hal.selection import Choice, dtype_name

__all__ = ["CLASS_OPS", "FUNCTION_OPS", "OpQuery", "OpTable"]

#: Functional ops by name, with the reference that defines each.
FUNCTION_OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": reference.rms_norm,
    "add_rms_norm": reference.add_rms_norm,
    "silu_mul": reference.silu_mul,
    "gelu_tanh_mul": reference.gelu_tanh_mul,
    "rope": reference.rope,
    "qk_norm_rope_write": reference.qk_norm_rope_write,
    "merge_lse": reference.merge_lse,
    "copy_blocks": copy_blocks,
    "argmax": sampling.argmax,
    "sample": sampling.sample,
}

#: Ops whose implementations are classes, chosen per query.
CLASS_OPS = ("attention", "linear")


@dataclass(frozen=True, kw_only=True)
class OpQuery:
    """What a functional op is asked for: models in ``dtype``, and over which caches where it touches one."""

    op: str
    dtype: torch.dtype
    layout: KVLayout | None = None

    def __str__(self) -> str:
        return f"{self.op} in {dtype_name(self.dtype)}"


@dataclass
class OpTable:
    """The functions that a model calls, chosen once for a device. Plain callables: a call costs nothing more."""

    rms_norm: Callable[..., torch.Tensor] = reference.rms_norm
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = reference.add_rms_norm
    silu_mul: Callable[[torch.Tensor], torch.Tensor] = reference.silu_mul
    gelu_tanh_mul: Callable[[torch.Tensor], torch.Tensor] = reference.gelu_tanh_mul
    rope: Callable[..., torch.Tensor] = reference.rope
    qk_norm_rope_write: Callable[..., torch.Tensor] = reference.qk_norm_rope_write
    merge_lse: Callable[..., tuple[torch.Tensor, torch.Tensor]] = reference.merge_lse
    copy_blocks: Callable[..., None] = copy_blocks
    argmax: Callable[[torch.Tensor], torch.Tensor] = sampling.argmax
    sample: Callable[..., torch.Tensor] = sampling.sample
    choices: dict[str, Choice] = field(default_factory=dict)
