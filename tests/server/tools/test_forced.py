"""What forces calls, formats and thinking compiles, and allows what the model's own way of writing is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dougong.engine.grammars import GrammarCompiler
from dougong.errors import InvalidRequestError
from dougong.models import get_tokenizer
from dougong.server.formats import combined, read_response_format, read_structured
from dougong.server.reasoning import REASONING_FORMATS
from dougong.server.tools import TOOL_FORMATS
from dougong.types import StructuredOutput

VOCAB = 260
PLACE = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
ROME = '{"city": "Rome", "days": 3}'


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return get_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: tokenizer, VOCAB, [256])
    yield made
    made.close()


def allows(compiler: GrammarCompiler, tokenizer: Any, asked: StructuredOutput | None, text: str) -> bool:
    """Whether a completion may be just this text."""
    assert asked is not None
    grammar = compiler.compile(asked)
    guide = grammar.start(())
    for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 256]:
        if guide.complete:
            return token == 256
        bits = np.zeros((1, -(-VOCAB // 32)), dtype=np.int32)
        grammar.fill([guide], bits)
        assert not guide.error
        if not int(bits[0, token // 32]) >> (token % 32) & 1:
            return False
        grammar.accept([guide], [token])
    return True


WRITTEN = {
    "hermes": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n"),
    "llama3": ('{{"name": "weather", "parameters": {}}}', None),
    "mistral": ('{{"name": "weather", "arguments": {}}}', ", "),
    "mistral-marks": ("[TOOL_CALLS]weather[ARGS]{}", ""),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_forced_calls(compiler: GrammarCompiler, tokenizer: Any, name: str) -> None:
    form = TOOL_FORMATS[name.partition("-")[0]](template="[ARGS]" if name == "mistral-marks" else "")
    one, between = WRITTEN[name]
    frame = "[TOOL_CALLS][{}]" if name == "mistral" else "{}"

    def forced(choice: Any, parallel: bool = True) -> StructuredOutput | None:
        return combined(None, form.grammar(TOOLS, choice, parallel), None, "")

    call = one.format(ROME)
    for choice in ("required", {"name": "weather"}):
        assert allows(compiler, tokenizer, forced(choice), frame.format(call))
        assert not allows(compiler, tokenizer, forced(choice), "It is warm.")
        assert not allows(compiler, tokenizer, forced(choice), frame.format(one.format('{"days": 3}')))
    other = frame.format(one.format("{}").replace("weather", "now"))
    assert allows(compiler, tokenizer, forced("required"), other)
    assert not allows(compiler, tokenizer, forced({"name": "weather"}), other)
    more = frame.format(one.format('{"other": 1}').replace("weather", "now"))
    assert not allows(compiler, tokenizer, forced("required"), more)
    twice = frame.format(f"{call}{between}{call}")
    assert allows(compiler, tokenizer, forced("required"), twice) == (between is not None)
    assert not allows(compiler, tokenizer, forced("required", parallel=False), twice)
    # What was forced is found again.
    parser = form.parser(TOOLS)
    pieces = parser.feed(frame.format(call)) + parser.finish()
    assert json.loads("".join(piece.arguments for piece in pieces)) == json.loads(ROME)  # type: ignore[union-attr]


def test_a_bomb_among_the_arguments_is_refused_as_one_in_a_response_format_is(compiler: GrammarCompiler) -> None:
    """Where calls or thinking come into it, schemas are written into a grammar."""
    bomb = {"allOf": [{"multipleOf": 7919}, {"multipleOf": 104729}]}
    place = {"type": "object", "properties": {"x": bomb}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": place}}]
    forced = combined(None, TOOL_FORMATS["hermes"]().grammar(tools, "required", True), None, "")
    thought = combined(StructuredOutput(json=place), None, REASONING_FORMATS["think"], "<think>")
    deep = StructuredOutput(lark="start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000)
    nested = StructuredOutput(lark="start: %json " + '{"items":' * 70 + "{}" + "}" * 70)
    broken = StructuredOutput(lark="start: %json {")
    for asked, words in ((forced, "multipleOf"), (thought, "multipleOf"), (deep, "deep"), (nested, "64 levels"),
                         (broken, "StructuredOutput")):  # fmt: skip
        assert asked is not None
        with pytest.raises(InvalidRequestError, match=words):
            compiler.compile(asked)


ANSWERS = {
    "json": (StructuredOutput(json=PLACE), ROME),
    "compact": (StructuredOutput(json=PLACE, whitespace=False), '{"city":"Rome"}'),
    "regex": (StructuredOutput(regex=r"\d+/\w+"), "12/ab"),
    "choice": (StructuredOutput(choice=["yes", 'n"o']), 'n"o'),
    "lark": (StructuredOutput(lark='start: word "!"\nword: /[a-z]+/'), "hello!"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_thinking_stays_free_before_a_form(compiler: GrammarCompiler, tokenizer: Any, kind: str) -> None:
    asked, text = ANSWERS[kind]
    think = REASONING_FORMATS["think"]
    plain = combined(asked, None, None, "")
    assert plain == asked and allows(compiler, tokenizer, plain, text)
    inside = combined(asked, None, think, "…<think>\n")
    assert allows(compiler, tokenizer, inside, f"Let me see: {{ < / 3\n</think>\n\n{text}")
    assert not allows(compiler, tokenizer, inside, text)
    may = combined(asked, None, think, "[assistant] ")
    assert allows(compiler, tokenizer, may, text)
    assert allows(compiler, tokenizer, may, f"<think>\nhm</think>\n{text}")
    assert not allows(compiler, tokenizer, may, f"hm</think>\n{text}")
    assert combined(asked, None, think, "<think>\n\n</think>\n\n") == asked


def test_calls_or_an_answer_of_a_form(compiler: GrammarCompiler, tokenizer: Any) -> None:
    form = TOOL_FORMATS["hermes"]()
    asked = combined(StructuredOutput(json=PLACE), form.grammar(TOOLS, "auto", True), None, "")
    assert allows(compiler, tokenizer, asked, ROME)
    assert allows(compiler, tokenizer, asked, WRITTEN["hermes"][0].format(ROME))
    assert not allows(compiler, tokenizer, asked, "Rome")


def test_formats_of_the_api() -> None:
    assert read_response_format(None) is None and read_response_format({"type": "text"}) is None
    assert read_response_format({"type": "json_object"}) == StructuredOutput(json=True)
    schema = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": PLACE}}
    assert read_response_format(schema) == StructuredOutput(json=PLACE)
    flat = {"type": "json_schema", "name": "place", "schema": PLACE}
    assert read_response_format(flat) == StructuredOutput(json=PLACE)
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 1}}):
        with pytest.raises(InvalidRequestError, match="response_format"):
            read_response_format(wrong)
    assert read_structured({"grammar": "start: /a/"}) == StructuredOutput(lark="start: /a/")
    assert read_structured({"json_object": True, "json": None}) == StructuredOutput(json=True)
    for wrong in ({}, {"regex": "a", "choice": ["b"]}, {"jsn": {}}):
        with pytest.raises(InvalidRequestError, match="structured_outputs"):
            read_structured(wrong)
