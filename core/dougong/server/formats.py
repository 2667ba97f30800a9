"""What the API asks of an answer's form, as what the engine keeps to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.server.reasoning import ReasoningFormat
from dougong.types import StructuredOutput

__all__ = ["combined", "read_response_format", "read_structured"]

#: As `dougong.engine.grammars` allows it in JSON.
_WHITE_SPACE = r"[ \n]{0,1}[ ]{0,16}"
_TYPES = ("text", "json_object", "json_schema")
_START = re.compile(r"^\s*\??start\b", re.MULTILINE)


def read_response_format(form: Mapping[str, Any] | None) -> StructuredOutput | None:
    """OpenAI's ``response_format`` (or Responses' ``text.format``, where the schema stands one level higher).

    Raises:
        InvalidRequestError: names what is wrong with it.
    """
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise InvalidRequestError(f"the answer's format: expected an object with a type ({', '.join(_TYPES)}).")
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        # llama.cpp, Fireworks and others let a schema stand here; it must not go unheard.
        schema = form.get("schema")
        return StructuredOutput(json=True if schema is None else schema)
    if kind != "json_schema":
        raise InvalidRequestError(f"response_format.type={kind!r}: allowed is {', '.join(_TYPES)}.")
    inner = form.get("json_schema", form)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(
            'response_format: expected {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}.'
        )
    return StructuredOutput(json=schema)


def read_structured(fields: Mapping[str, Any] | None) -> StructuredOutput | None:
    """vLLM's ``structured_outputs``: one of json, json_object, regex, choice, grammar.

    Raises:
        InvalidRequestError: another field, or none or several.
    """
    if fields is None:
        return None
    names = {"json": "json", "json_object": "json", "regex": "regex", "choice": "choice", "grammar": "lark"}
    given = {name: value for name, value in fields.items() if value is not None and value is not False}
    unknown = set(given) - set(names)
    if unknown or len(given) != 1:
        raise InvalidRequestError(
            f"structured_outputs has {sorted(given) or 'nothing'}; allowed is exactly one of {', '.join(names)}."
        )
    ((name, value),) = given.items()
    return StructuredOutput(**{names[name]: value})


def combined(
    answer: StructuredOutput | None, calls: str | None, reasoning: ReasoningFormat | None, prompt: str
) -> StructuredOutput | None:
    """The form of a whole completion, thinking included.

    Args:
        answer: what the answer's text must look like; None: anything.
        calls: rule ``calls`` and those below it, where the answer is, or may be, calls of tools.
        reasoning: how the model marks its thinking, which stays free.
        prompt: the rendered prompt, which shows whether the answer begins inside a thought.
    """
    if answer is None and calls is None:
        return None
    thought = None if reasoning is None else _thought(reasoning, prompt)
    if thought is None and calls is None:
        return answer
    rules = []
    names = []
    if calls is not None:
        names.append("calls")
        rules.append(calls)
    if answer is not None:
        names.append("answer")
        rules.append(_answer_rule(answer))
    begin = ""
    if thought is not None:
        begin, rule = thought
        rules.append(rule)
    return StructuredOutput(lark="\n".join([f"start: {begin}({' | '.join(names)})", *rules]))


def _thought(form: ReasoningFormat, prompt: str) -> tuple[str, str] | None:
    """(what ``start`` begins with, the rule of a thought); None where the prompt has closed it already."""
    body = f"thought[lazy]: /(.|\\n)*{_escaped(form.close)}/\nGAP: /\\n{{0,2}}/"
    if form.begins_inside(prompt):
        return "thought GAP ", body
    if prompt.rstrip().endswith(form.close):
        return None
    return f"({json.dumps(form.open)} thought GAP)? ", body


def _answer_rule(answer: StructuredOutput) -> str:
    if answer.json is not None:
        schema = json.loads(answer.schema)
        space: dict[str, Any] = {"whitespace_flexible": False}
        if answer.whitespace:
            space = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE}
        return f"answer: %json {json.dumps(schema | {'x-guidance': space}, ensure_ascii=False)}"
    if answer.choice is not None:
        return "answer: " + " | ".join(map(json.dumps, answer.choice))
    if answer.regex is not None:
        from llguidance import regex_to_lark

        return f"answer: /{regex_to_lark(answer.regex, 'd')}/"
    assert answer.lark is not None
    if not _START.search(answer.lark):
        raise InvalidRequestError(
            "a grammar together with thinking or tools must be in Lark's syntax, with a rule 'start'."
        )
    return f"answer: %lark {{\n{answer.lark}\n}}"


def _escaped(text: str) -> str:
    """Text inside ``/…/``."""
    return re.sub(r"([^\w\s<>])", r"\\\1", text)
