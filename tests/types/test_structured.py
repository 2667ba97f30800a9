"""StructuredOutput takes one form, keeps it as text, and refuses what is no form."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from dougong.errors import InvalidRequestError
from dougong.types import SamplingParams, StructuredOutput


def test_a_schema_is_kept_as_text_in_its_order() -> None:
    schema = {"type": "object", "properties": {"z": {"type": "null"}, "a": {"const": "é"}}}
    asked = StructuredOutput(json=schema)
    assert asked.json == '{"type": "object", "properties": {"z": {"type": "null"}, "a": {"const": "é"}}}'
    assert asked == StructuredOutput(json=asked.json) and hash(asked) == hash(StructuredOutput(json=schema))
    assert pickle.loads(pickle.dumps(asked)) == asked and asked.kind == "json"
    assert StructuredOutput(json=True).json == '{"type": "object"}'


def test_a_pydantic_model_is_a_schema() -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Point", x=(int, ...), y=(int, ...))
    assert '"required": ["x", "y"]' in str(StructuredOutput(json=model).json)


def test_choices_are_kept_once_each() -> None:
    assert StructuredOutput(choice=["b", "a", "b"]).choice == ("b", "a")


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "nothing given"),
        ({"json": True, "regex": "a"}, r"\['json', 'regex'\] given"),
        ({"json": False}, "a bool"),
        ({"json": "{"}, "not JSON"),
        ({"json": [1]}, "a list"),
        ({"json": {"const": float("nan")}}, "not JSON"),
        ({"json": {"const": object()}}, "not JSON"),
        ({"json": _nested(100)}, "levels deep"),
        ({"json": _nested(50_000)}, "levels deep"),
        ({"json": "[" * 100_000}, "not JSON"),
        ({"json": {"description": "x" * 300_000}}, "bytes; allowed"),
        ({"json": '"' + "x" * 300_000}, "bytes; allowed"),
        ({"regex": ""}, "not empty"),
        ({"regex": 5}, "a int"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"lark": "x" * 300_000}, "bytes; allowed"),
        ({"choice": []}, "0 entries"),
        ({"choice": ["a", ""]}, "no text"),
        ({"choice": ["a", 1]}, "no text"),
        ({"choice": "abc"}, "a str"),
        ({"choice": [f"{i}" for i in range(10_001)]}, "10001 entries"),
        ({"regex": "a", "whitespace": 1}, "neither True nor False"),
    ],
)
def test_what_is_no_form_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        StructuredOutput(**given)


def test_sampling_options_take_nothing_else() -> None:
    with pytest.raises(InvalidRequestError, match="StructuredOutput"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]
