"""Planting a mutant into the backend that a worker has opened."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from importlib import resources
from typing import Any

from dougong_compat.selftest.mutants import all_mutants
from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["at_uproot", "mutated_source", "plant", "uproot"]

_KERNELS = "dougong_compat.selftest.kernels"
_undo: list[Callable[[], None]] = []


def mutated_source(mutant: Mutant) -> str:
    """The honest kernels' (or the late device's) text with the bug in it.

    Raises:
        ValueError: a line to replace does not stand there exactly once (for its class): the mutant is out of date.
    """
    text = (resources.files("dougong_compat") / "selftest" / mutant.file).read_text(encoding="utf-8")
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        if text.count(old) != 1:
            raise ValueError(f"mutant {mutant.name}: {text.count(old)} places read {old!r}, expected one")
        text = text.replace(old, new)
    return text


def at_uproot(call: Callable[[], None]) -> None:
    """Have ``call`` made before another backend is opened in this process: what reaches beyond a backend ends there."""
    _undo.append(call)


def uproot() -> None:
    """Take back every patch of the block manager, and let a late device's queue go."""
    while _undo:
        _undo.pop()()


def _patch(owner: Any, name: str, value: Any) -> None:
    honest = owner.__dict__[name]
    at_uproot(lambda: setattr(owner, name, honest))
    setattr(owner, name, value)


def plant(context: Any, name: str) -> None:
    """Put mutant ``name`` in place of the honest code; earlier patches are taken back first."""
    uproot()
    mutant = next(mutant for mutant in all_mutants() if mutant.name == name)
    if mutant.manager:
        from dougong_compat.selftest import manager_bugs

        getattr(manager_bugs, mutant.manager)(importlib.import_module("dougong.kv"), _patch)
        return
    module = types.ModuleType(f"dougong_compat_mutant_{name.replace('-', '_')}")
    sys.modules[module.__name__] = module
    exec(compile(mutated_source(mutant), f"<mutant {name}>", "exec"), module.__dict__)
    if mutant.file == "late.py":
        context.device = context.backend.device = module.LateDevice(context.device.index)
        context.device.setup()
        return
    for op, candidates in context.backend.candidates.items():
        for index, candidate in enumerate(candidates):
            target = candidate.spec.target
            if target.startswith(f"{_KERNELS}:"):
                spec = dataclasses.replace(candidate.spec, target=f"{module.__name__}:{target.partition(':')[2]}")
                context.backend.candidates[op][index] = dataclasses.replace(candidate, spec=spec)
