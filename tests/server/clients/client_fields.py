"""Answers against a client's own types, field by field."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel

__all__ = ["check_fields"]


def check_fields(body: Any, model: type[BaseModel], extra: frozenset[str] = frozenset(), where: str = "") -> None:
    """Every field is one of the model's (or ``extra``), and every one that it requires is there, of its type."""
    model.model_validate(body)
    known = {field.alias or name for name, field in model.model_fields.items()}
    assert set(body) <= known | extra, f"{where}{model.__name__}: {set(body) - known}"
    for name, field in model.model_fields.items():
        name = field.alias or name
        if field.is_required():
            assert name in body, f"{where}{model.__name__}.{name} is missing"
        value = body.get(name)
        for one in value if isinstance(value, list) else [value]:
            kind = _kind(field.annotation, one)
            if kind is not None:
                check_fields(one, kind, extra, f"{where}{name}.")


def _kind(hint: Any, value: Any) -> type[BaseModel] | None:
    """The model of ``hint`` that ``value`` is: of several, the one whose ``type`` it has."""
    if not isinstance(value, dict):
        return None
    kinds = _models(hint)
    if len(kinds) > 1:
        kinds = [kind for kind in kinds if _type(kind) and value.get("type") in _type(kind)]
    return kinds[0] if kinds else None


def _models(hint: Any) -> list[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    return [kind for part in get_args(hint) for kind in _models(part)] if get_origin(hint) else []


def _type(kind: type[BaseModel]) -> tuple[Any, ...]:
    field = kind.model_fields.get("type")
    return () if field is None else get_args(field.annotation)
