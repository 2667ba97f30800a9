"""Planting a mutant into the backend that a worker has opened."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from importlib import resources
from typing import Any

from dougong_compat.selftest.mutants import all_mutants
from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["mutated_source", "plant", "uproot"]

_KERNELS = "dougong_compat.selftest.kernels"
_undo: list[tuple[Any, str, Any]] = []


def mutated_source(mutant: Mutant) -> str:
    """The honest kernels' text with the bug in it.

    Raises:
        ValueError: a line to replace does not stand there exactly once (for its class): the mutant is out of date.
    """
    text = resources.files("dougong_compat").joinpath("selftest", "kernels.py").read_text(encoding="utf-8")
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        if text.count(old) != 1:
            raise ValueError(f"mutant {mutant.name}: {text.count(old)} places read {old!r}, expected one")
        text = text.replace(old, new)
    return text


def uproot() -> None:
    """Take back every patch of the block manager."""
    while _undo:
        owner, name, value = _undo.pop()
        setattr(owner, name, value)


def _patch(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, owner.__dict__[name]))
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
    for op, candidates in context.backend.candidates.items():
        for index, candidate in enumerate(candidates):
            target = candidate.spec.target
            if target.startswith(f"{_KERNELS}:"):
                spec = dataclasses.replace(candidate.spec, target=f"{module.__name__}:{target.partition(':')[2]}")
                context.backend.candidates[op][index] = dataclasses.replace(candidate, spec=spec)
