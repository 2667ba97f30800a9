"""Vendors' libraries, where a backend offers them beside the portable kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dougong.hal import Refusal

__all__ = ["unusable"]


def unusable(load: Callable[[], Any]) -> tuple[Refusal, ...]:
    """Why the operators that ``load`` gives cannot be used; empty if they can. It raises ImportError with what does not
    fit."""
    try:
        load()
    except ImportError as error:
        return (Refusal(str(error), "the triton provider"),)
    return ()
