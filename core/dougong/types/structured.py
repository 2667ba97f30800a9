"""What the text of a completion must look like. Pure Python; the engine compiles it (`dougong.engine.grammars`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dougong.errors import InvalidRequestError

__all__ = ["StructuredOutput"]

#: Bytes of a schema, expression or grammar, levels of a schema, and entries of a choice: more is refused unread.
MAX_BYTES = 256 << 10
MAX_DEPTH = 64
MAX_CHOICES = 10_000

_KINDS = ("json", "regex", "choice", "lark")


def _refuse(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"StructuredOutput({name}=…): {problem}")


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """Exactly one of its four forms. Immutable, hashable, and cheap to compare: it is the key of compiled grammars.

    Example:
        >>> StructuredOutput(choice=["yes", "no"]).choice
        ('yes', 'no')

    Raises:
        InvalidRequestError: none or several forms are given, one is of a wrong type, or too large.
    """

    # Not its true union: the message to the engine's process is decoded by these types, and msgspec knows no type[Any].
    json: Any = None
    """A JSON schema: given as a mapping, its text, a pydantic model, or True for any object; kept as text.

    Properties come in the schema's order."""
    regex: str | None = None
    """A regular expression that the whole text matches: Rust's syntax, without look-around and back-references."""
    choice: Sequence[str] | None = None
    """The text is one of these; kept as a tuple."""
    lark: str | None = None
    """A context-free grammar in Lark's syntax whose first rule is ``start``, or in GBNF's (``root ::= …``)."""
    whitespace: bool = True
    """Whether JSON may have white space between its parts; False gives the compact form."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        given: dict[str, Any] = {name: getattr(self, name) for name in _KINDS if getattr(self, name) is not None}
        if len(given) != 1:
            raise InvalidRequestError(
                f"StructuredOutput: {sorted(given) or 'nothing'} given; allowed is exactly one of {', '.join(_KINDS)}."
            )
        if not isinstance(self.whitespace, bool):
            raise _refuse("whitespace", f"{self.whitespace!r} is neither True nor False.")
        ((name, value),) = given.items()
        if name == "json":
            value = _schema_text(value)
        elif name == "choice":
            value = _choices(value)
        elif not isinstance(value, str) or not value:
            raise _refuse(name, f"a {type(value).__name__}; allowed is a string that is not empty.")
        size = sum(map(_size, value)) if isinstance(value, tuple) else _size(value)
        if size > MAX_BYTES:
            raise _refuse(name, f"{size} bytes; allowed are {MAX_BYTES}. Make it smaller.")
        put(self, name, value)

    @property
    def kind(self) -> str:
        """Which form it is: the field's name."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def schema(self) -> str:
        """The JSON schema's text."""
        assert isinstance(self.json, str), "kept as text"
        return self.json


def _size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError("StructuredOutput: the text has lone surrogates, which are no characters.") from None


def _schema_text(value: Any) -> str:
    """The schema as JSON text, its keys in the order given."""
    allowed = "a mapping, its JSON text, a pydantic model, or True for any object"
    if value is True:
        return '{"type": "object"}'
    describe = getattr(value, "model_json_schema", None)
    if callable(describe):
        value = describe()
    if isinstance(value, str):
        if _size(value) > MAX_BYTES:
            raise _refuse("json", f"{_size(value)} bytes; allowed are {MAX_BYTES}. Make it smaller.")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _refuse("json", f"not JSON ({error}); allowed is {allowed}.") from None
    if not isinstance(value, Mapping):
        raise _refuse("json", f"a {type(value).__name__}; allowed is {allowed}.")
    depth = _depth(value)
    if depth > MAX_DEPTH:
        raise _refuse("json", f"nested more than {MAX_DEPTH} levels deep; use $defs and $ref, or make it flatter.")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _refuse("json", f"not JSON ({error}); allowed is {allowed}.") from None


def _depth(value: Any) -> int:
    """Levels of nesting, found without recursion; gives up just above the limit."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        below: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                below += [child for child in one.values() if isinstance(child, (Mapping, list, tuple))]
            elif isinstance(one, (list, tuple)):
                below += [child for child in one if isinstance(child, (Mapping, list, tuple))]
        level = below
    return depth


def _choices(value: Iterable[Any]) -> tuple[str, ...]:
    allowed = f"1 to {MAX_CHOICES} strings, none of them empty"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refuse("choice", f"a {type(value).__name__}; allowed are {allowed}.")
    out = tuple(value)
    if all(isinstance(one, str) and one for one in out):
        out = tuple(dict.fromkeys(out))
        if 1 <= len(out) <= MAX_CHOICES:
            return out
    raise _refuse("choice", f"{len(out)} entries, or one that is no text; allowed are {allowed}.")
