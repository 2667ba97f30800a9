"""All cases, by level and noun."""

from __future__ import annotations

import importlib
from functools import lru_cache

from dougong_compat.case import Case

__all__ = ["MODULES", "collect_all", "collect_profile", "find_case"]

MODULES = ("device", "attention", "write", "ops", "paging", "manager", "engine", "stress", "regression", "corpus")


@lru_cache(maxsize=2)
def collect_all(deep: bool = True) -> tuple[Case, ...]:
    """Every case in a fixed order; ids are unique. Without ``deep`` some cases of the full profile are left out."""
    cases: list[Case] = []
    seen: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(f"dougong_compat.cases.{name}")
        for case in module.collect(deep) if name == "attention" else module.collect():
            assert case.id not in seen, f"two cases are called {case.id} ({seen[case.id]}, {name})"
            seen[case.id] = name
            cases.append(case)
    return tuple(sorted(cases, key=lambda case: case.level))


def collect_profile(profile: str) -> list[Case]:
    """The cases of a profile."""
    return [case for case in collect_all(profile in ("full", "certified")) if case.in_profile(profile)]


def find_case(case_id: str) -> Case | None:
    """The case with this id."""
    for deep in (False, True):
        for case in collect_all(deep):
            if case.id == case_id:
                return case
    return None
