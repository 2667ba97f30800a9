"""What a way to write tool calls consists of."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dougong.server.chat.turn import TextDelta, ToolCallDelta, ToolChoice

__all__ = ["MOST_CALLS", "Piece", "ToolFormat", "ToolParser", "arguments_rule", "new_id", "quoted"]

Piece = TextDelta | ToolCallDelta

#: Calls that one answer may have when a grammar forces them.
MOST_CALLS = 8


class ToolParser(ABC):
    """Finds the calls in one answer's text. Holds back what may be the beginning of a mark; ``choice`` is left 0."""

    @abstractmethod
    def feed(self, text: str) -> list[Piece]:
        """What is certain now of the text so far."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """What was held back, when no text will follow."""


@dataclass(frozen=True)
class ToolFormat(ABC):
    """One way to write tool calls.

    Args:
        special: ids of marks that are special tokens of this model, by their text.
        template: the model's chat template.
    """

    special: Mapping[str, int] = field(default_factory=dict)
    template: str = ""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]] = ()
    """Marks that may be special tokens."""

    @property
    def keeps_special(self) -> bool:
        """Whether special tokens must stay in the text, because calls are marked by them."""
        return bool(self.special)

    @abstractmethod
    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        """For one answer."""

    @abstractmethod
    def rules(self, names: Sequence[str], parallel: bool) -> str:
        """The rule ``calls`` and those below it, in Lark; the arguments of tool i are rule
        ``args_i``, and ``names[i]`` its name."""

    def grammar(self, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, parallel: bool) -> str:
        """Rule ``calls`` and those below it, in Lark: the calls that ``choice`` allows, one at least."""
        functions = [tool["function"] for tool in tools]
        if not isinstance(choice, str):
            functions = [function for function in functions if function["name"] == choice["name"]]
            parallel = False
        rules = [arguments_rule(place, function.get("parameters")) for place, function in enumerate(functions)]
        return "\n".join([self.rules([function["name"] for function in functions], parallel), *rules])

    def mark(self, text: str) -> str:
        """A mark in Lark: a special token by its id, other text as it is."""
        return f"<[{self.special[text]}]>" if text in self.special else quoted(text)


def arguments_rule(place: int, schema: Mapping[str, Any] | None) -> str:
    """Rule ``args_<place>``: arguments as the schema says, written as Python's json.dumps writes them."""
    own: dict[str, Any] = dict(schema) if schema else {"type": "object", "properties": {}}
    own.setdefault("type", "object")
    if not {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"} & set(own):
        own.setdefault("additionalProperties", False)  # no function wants arguments that it does not name
    own["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"args_{place}: %json {json.dumps(own, ensure_ascii=False)}"


def quoted(text: str) -> str:
    """A string of Lark."""
    return json.dumps(text)


def new_id() -> str:
    """An id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"
