#!/usr/bin/env python3
"""Write down the public names and signatures of dougong, one a line, so that a change of them is seen.

What is public: the names in ``__all__`` of the modules below, the public attributes of the classes among
them, the fields of dataclasses, the members of enums, and every hook with its argument names. Annotations
are left out: they are mypy's business, and they print differently from one Python to the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "tests" / "repository" / "api.txt"

MODULES = (
    "dougong",
    "dougong.errors",
    "dougong.types",
    "dougong.plugins",
    "dougong.hal",
    "dougong.kv",
    "dougong.scheduling",
)
HOOKS = "dougong.plugins.hookspecs"

#: Members that enum and ABC machinery put on a class, other than those that we write.
_GENERATED = {"mro", "register"}


def signature(function: Any) -> str:
    """``(self, a, b=…, *, c)``: names, kinds and whether there is a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "(…)"
    parts: list[str] = []
    starred = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        text = parameter.name if parameter.default is parameter.empty else f"{parameter.name}=…"
        if parameter.kind is parameter.VAR_POSITIONAL:
            text, starred = f"*{parameter.name}", True
        elif parameter.kind is parameter.VAR_KEYWORD:
            text = f"**{parameter.name}"
        parts.append(text)
    return f"({', '.join(parts)})"


def members(cls: type) -> Iterator[tuple[str, str]]:
    """Public attributes of a class that it or one of our own bases defines."""
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("dougong"):
            continue
        for name, raw in vars(base).items():
            if name.startswith("_") or name in seen or name in fields or name in _GENERATED:
                continue
            seen.add(name)
            if isinstance(raw, (property, functools.cached_property)):
                yield name, "property"
            elif isinstance(raw, (staticmethod, classmethod)):
                yield name, f"{type(raw).__name__} {signature(raw.__func__)}"
            elif inspect.isfunction(raw):
                yield name, f"method {signature(raw)}"
            else:
                yield name, "attribute"


def describe(path: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        if issubclass(value, enum.Enum):
            yield f"{path}: enum"
            for member in value:
                yield f"{path}.{member.name} = {member.value!r}"
            return
        if issubclass(value, BaseException):
            yield f"{path}: exception ({value.__mro__[1].__name__}) {signature(value.__init__)}"
            return
        kind = "dataclass" if dataclasses.is_dataclass(value) else "class"
        abstract = sorted(getattr(value, "__abstractmethods__", ()))
        yield f"{path}: {kind} {signature(value)}"
        for name, text in sorted(members(value)):
            yield f"{path}.{name}: {text}{' abstract' if name in abstract else ''}"
    elif inspect.isroutine(value):
        yield f"{path}: function {signature(value)}"
    elif path.endswith("__version__"):
        yield f"{path}: str"
    elif inspect.ismodule(value):
        yield f"{path}: module"
    else:
        yield f"{path}: {type(value).__name__}"


def hooks() -> Iterator[str]:
    module = importlib.import_module(HOOKS)
    for name, value in sorted(vars(module).items()):
        if name.startswith("dougong_") and inspect.isfunction(value):
            options = getattr(value, "dougong_spec", {}) or {}
            first = " firstresult" if options.get("firstresult") else ""
            yield f"hook {name}{signature(value)}{first}"


def render() -> str:
    lines: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            lines.extend(describe(f"{name}.{public}", getattr(module, public)))
    lines.extend(hooks())
    return "\n".join(lines) + "\n"


def difference() -> str:
    """Empty when the code says what the lock says; a unified diff otherwise."""
    locked = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    return "\n".join(
        difflib.unified_diff(locked.splitlines(), render().splitlines(), "locked", "in the code", lineterm="")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {LOCK.relative_to(ROOT)}")
    if parser.parse_args().write:
        LOCK.write_text(render(), encoding="utf-8")
    else:
        text = difference()
        print(text or "The public names are those of the lock.")
        sys.exit(bool(text))
