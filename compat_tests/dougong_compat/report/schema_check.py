"""Checking a document against the part of JSON Schema that our schema uses, without another dependency."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["violations"]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "null": (type(None),), "boolean": (bool,),
}  # fmt: skip


def violations(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """Every place where ``value`` is not as ``schema`` says; empty when it is."""
    if "const" in schema:
        return [] if value == schema["const"] else [f"{path}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{path}: {value!r} is none of {schema['enum']}"]
    named = schema.get("type", [])
    kinds = [named] if isinstance(named, str) else named
    if kinds and not any(
        isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind != "boolean") for kind in kinds
    ):
        return [f"{path}: {type(value).__name__} is none of {kinds}"]
    found: list[str] = []
    if isinstance(value, dict):
        found += [f"{path}: {name!r} is missing" for name in schema.get("required", []) if name not in value]
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        for name, item in value.items():
            if name in known:
                found += violations(item, known[name], f"{path}.{name}")
            elif rest is False:
                found.append(f"{path}: {name!r} is not known")
            elif isinstance(rest, dict):
                found += violations(item, rest, f"{path}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += violations(item, schema["items"], f"{path}[{index}]")
    elif isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            found.append(f"{path}: too short")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.append(f"{path}: {value!r} does not match {schema['pattern']}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value < schema.get("minimum", value):
        found.append(f"{path}: {value} is below {schema['minimum']}")
    return found
