"""All cases, by level and noun."""

from __future__ import annotations

import importlib
from functools import lru_cache

from dougong_compat.case import Case

__all__ = ["MODULES", "collect_all", "collect_profile"]

MODULES = ("attention",)


@lru_cache(maxsize=1)
def collect_all() -> tuple[Case, ...]:
    """Every case of every profile, in a fixed order; ids are unique."""
    cases: list[Case] = []
    seen: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(f"dougong_compat.cases.{name}")
        for case in module.collect():
            assert case.id not in seen, f"two cases are called {case.id} ({seen[case.id]}, {name})"
            seen[case.id] = name
            cases.append(case)
    return tuple(sorted(cases, key=lambda case: case.level))


def collect_profile(profile: str) -> list[Case]:
    return [case for case in collect_all() if case.in_profile(profile)]
