"""Whether the suite's code is still the suite's: a plugin is imported into the process that asks, and may have put
something else in its place.

This finds functions, methods and classes that another package has put into the suite's modules. It does not stop
whoever means to forge; docs/conformance.md says what the rules can do and what they cannot.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["changes"]

_OWN = "dougong_compat"
_CHEATS = f"{_OWN}.selftest.cheats"
_HOME = str(Path(__file__).parent)
#: Packages whose functions and classes may stand in the suite's modules: the standard library and its dependencies.
_KNOWN = frozenset({
    *sys.stdlib_module_names, "__main__", "click", "dougong", _OWN, "hypothesis", "numpy", "pluggy", "pytest",
    "_pytest", "rich", "safetensors", "tomli", "torch", "typer",
})  # fmt: skip


def changes() -> list[str]:
    """What does not belong where it stands in the suite's modules, and whose it is; empty as it should be."""
    found: list[str] = []
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        real = spec.name if name == "__main__" and spec is not None else name
        if module is None or real.partition(".")[0] != _OWN or real.startswith(f"{_OWN}.selftest"):
            continue
        for where, value in _members(name, module):
            owner = _stranger(value)
            if owner:
                found.append(f"{where} is {owner}'s")
    return found


def _members(name: str, module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """A module's names, and those in its own classes."""
    for attribute, value in list(vars(module).items()):
        yield f"{name}.{attribute}", value
        if isinstance(value, type) and value.__module__ == name:
            for inner, member in list(vars(value).items()):
                yield f"{name}.{attribute}.{inner}", member


def _stranger(value: Any) -> str:
    """The module that ``value`` comes from, if it has no business here."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(value) if callable(value) else value
    if not isinstance(value, (types.FunctionType, type)):
        return ""
    module = str(value.__module__)
    if module.partition(".")[0] not in _KNOWN or module == _CHEATS:
        return module
    if isinstance(value, types.FunctionType) and module.partition(".")[0] == _OWN:
        file = value.__code__.co_filename  # what dataclasses write has no file
        if not file.startswith((_HOME, "<string>")):
            return file
    return ""
