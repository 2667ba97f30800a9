"""Planted bugs, each with the case that must kill it."""

from __future__ import annotations

from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["all_mutants"]


def all_mutants() -> list[Mutant]:
    """Every mutant; names are unique."""
    from dougong_compat.selftest.mutants import addressing, engine, masks, numerics, state

    found = [*addressing.MUTANTS, *masks.MUTANTS, *numerics.MUTANTS, *state.MUTANTS, *engine.MUTANTS]
    assert len({mutant.name for mutant in found}) == len(found)
    return found
