"""Tool calls are found however the text comes in pieces, and no part of a mark is ever shown."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from dougong.errors import ConfigError
from dougong.server.chat.turn import TextDelta, ToolCallDelta
from dougong.server.tools import TOOL_FORMATS, ToolParser, choose_tools
from dougong.server.tools.format import Piece
from dougong.server.tools.prompting import knows_tools, written_out

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "add")
]
ROME = ("get_weather", {"city": "Rome", "note": 'a "}" ] </tool> \\ é😀'})
SUM = ("add", {"a": [1, {"b": 2.5}], "c": None})
J_ROME, J_SUM = json.dumps(ROME[1], ensure_ascii=False), json.dumps(SUM[1])

H_SUM = f'<tool_call>\n{{"name": "add", "arguments": {J_SUM}}}\n</tool_call>'
NO_MARK = '1 < 2, <tool_cal is no mark; {"a": 1}\n'

Expected = tuple[str, list[tuple[str, Any]]]

CASES: dict[str, tuple[str, str, Expected]] = {
    "hermes-one": (
        "hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {J_ROME}}}\n</tool_call>', ("", [ROME])),
    "hermes-text-and-two": (
        "hermes",
        f'Let me see.\n\n<tool_call>{{"arguments": {J_ROME}, "name": "get_weather"}}</tool_call>\n{H_SUM}\n',
        ("Let me see.", [ROME, SUM]),
    ),
    "hermes-no-closing-mark": ("hermes", f'<tool_call>{{"name":"add","arguments":{J_SUM}}}', ("", [SUM])),
    "hermes-forgets-to-close": (
        "hermes",
        f'<tool_call>{{"name":"add","arguments":{J_SUM}}}<tool_call>{{"name":"add","arguments":{J_SUM}}}</tool_call>',
        ("", [SUM, SUM]),
    ),
    "hermes-no-arguments": ("hermes", '<tool_call>{"name": "add"}</tool_call>', ("", [("add", {})])),
    "hermes-arguments-as-text": (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {json.dumps(J_SUM)}}}</tool_call>',
        ("", [SUM]),
    ),
    "hermes-parameters": ("hermes", f'<tool_call>{{"name": "add", "parameters": {J_SUM}}}</tool_call>', ("", [SUM])),
    "hermes-text-only": ("hermes", NO_MARK, (NO_MARK, [])),
    "hermes-no-call-inside": (
        "hermes", "<tool_call>call it yourself</tool_call> ok", ("<tool_call>call it yourself</tool_call> ok", [])),
    "llama-json": ("llama3", f'{{"name": "get_weather", "parameters": {J_ROME}}}', ("", [ROME])),
    "llama-tag": ("llama3", f'<|python_tag|>{{"name": "add", "parameters": {J_SUM}}}<|eom_id|>', ("", [SUM])),
    "llama-two": (
        "llama3",
        f'{{"name": "add", "parameters": {J_SUM}}}; {{"name": "get_weather", "parameters": {J_ROME}}}',
        ("", [SUM, ROME]),
    ),
    "llama-python": (
        "llama3", "[get_weather(city='Rome', days=3), add(a=[1, -2], ok=true, d={'x': None})]",
        ("", [("get_weather", {"city": "Rome", "days": 3}), ("add", {"a": [1, -2], "ok": True, "d": {"x": None}})]),
    ),
    "llama-other-object": ("llama3", '{"name": "Bo", "age": 3}', ('{"name": "Bo", "age": 3}', [])),
    "llama-no-name": ("llama3", '{"age": 3}', ('{"age": 3}', [])),
    "llama-list": ("llama3", "[1, 2] are numbers", ("[1, 2] are numbers", [])),
    "llama-code": ("llama3", "[__import__('os').system('x')]", ("[__import__('os').system('x')]", [])),
    "llama-text": ("llama3", "It is <|warm| today.", ("It is <|warm| today.", [])),
    "mistral-list": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {J_ROME}}}, {{"name": "add", "arguments": {J_SUM}}}]',
        ("", [ROME, SUM]),
    ),
    "mistral-marks": (
        "mistral",
        f"Sure.[TOOL_CALLS]get_weather[ARGS]{J_ROME}[TOOL_CALLS]add[ARGS]{J_SUM}",
        ("Sure.", [ROME, SUM]),
    ),
    "mistral-plain-name": ("mistral", f"[TOOL_CALLS]add{J_SUM}", ("", [SUM])),
    "mistral-id": ("mistral", f"[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{J_SUM}", ("", [SUM])),
    "mistral-text": ("mistral", "[TOOL] is no mark", ("[TOOL] is no mark", [])),
    "mistral-no-call": ("mistral", "[TOOL_CALLS]!? nothing", ("[TOOL_CALLS]!? nothing", [])),
}  # fmt: skip


def parser_of(name: str) -> ToolParser:
    return TOOL_FORMATS[name]().parser(TOOLS)


def run(parser: ToolParser, chunks: list[str]) -> tuple[str, list[tuple[str, str]], list[Piece]]:
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    calls: dict[int, list[Any]] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            if piece.index not in calls:
                assert piece.id and piece.name, "a call begins with its id and name"
                calls[piece.index] = [piece.name, ""]
            else:
                assert piece.id is None and piece.name is None and piece.arguments
            calls[piece.index][1] += piece.arguments
    assert sorted(calls) == list(range(len(calls)))
    return text, [(name, arguments) for name, arguments in calls.values()], pieces


def splits(text: str) -> list[list[str]]:
    found = [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]
    rng = random.Random(len(text))
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, len(text)), min(6, len(text) - 1)))
        found.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])])
    return found


@pytest.mark.parametrize("case", CASES)
def test_calls_and_text_are_told_apart_however_they_come(case: str) -> None:
    name, written, (text, calls) = CASES[case]
    for chunks in splits(written):
        shown, found, _ = run(parser_of(name), chunks)
        assert shown == text, chunks
        assert [(one, json.loads(arguments)) for one, arguments in found] == calls, chunks


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2][1]])
def test_nothing_is_taken_back(case: str) -> None:
    """At every moment, what was shown is the beginning of what is right, so no part of a mark was."""
    name, written, (text, _) = CASES[case]
    parser = parser_of(name)
    shown = ""
    for char in written:
        shown += "".join(piece.text for piece in parser.feed(char) if isinstance(piece, TextDelta))
        assert text.startswith(shown)


def test_arguments_stream_while_they_are_written() -> None:
    parser = parser_of("hermes")
    parser.feed('<tool_call>{"name": "add", "arguments": {"a": "')
    assert [piece.arguments for piece in parser.feed("hello ") if isinstance(piece, ToolCallDelta)] == ["hello "]


def test_a_call_cut_off_keeps_what_there_was() -> None:
    text, calls, _ = run(parser_of("hermes"), ['<tool_call>{"name": "add", "arguments": {"a": [1'])
    assert (text, calls) == ("", [("add", '{"a": [1')])
    text, calls, _ = run(parser_of("hermes"), ['ok <tool_call>{"na'])
    assert (text, calls) == ('ok<tool_call>{"na', []) or (text, calls) == ('ok <tool_call>{"na', [])


def test_mistral_takes_ids_of_nine_letters() -> None:
    _, _, pieces = run(parser_of("mistral"), [f"[TOOL_CALLS]add[ARGS]{J_SUM}"])
    (first,) = [piece for piece in pieces if isinstance(piece, ToolCallDelta) and piece.id]
    assert first.id is not None and len(first.id) == 9 and first.id.isalnum()


class Words:
    """As much of a tokenizer as the choice looks at."""

    all_special_tokens = ("<s>", "[TOOL_CALLS]", "<|python_tag|>")

    def convert_tokens_to_ids(self, token: str) -> int:
        return 10 + self.all_special_tokens.index(token)


@pytest.mark.parametrize(
    ("template", "model", "name"),
    [
        ("… <tool_call> …", "x", "hermes"),
        ("… [TOOL_CALLS] …", "x", "mistral"),
        ("… <|python_tag|> …", "x", "llama3"),
        ("<|start_header_id|>", "x", "llama3"),
        ("", "mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("", "meta-llama/Llama-3.2-1B-Instruct", "llama3"),
        ("", "smollm2-135m", "hermes"),
    ],
)
def test_the_format_is_seen(template: str, model: str, name: str) -> None:
    found = choose_tools(None, tokenizer=Words(), chat_template=template, model=model)
    assert found is not None and found.name == name
    assert found.keeps_special == (name != "hermes")


def test_the_format_is_named() -> None:
    assert choose_tools("none", tokenizer=Words(), chat_template="<tool_call>", model="") is None
    found = choose_tools("llama3", tokenizer=Words(), chat_template="<tool_call>", model="")
    assert found is not None and found.name == "llama3" and found.mark("<|python_tag|>") == "<[12]>"
    with pytest.raises(ConfigError, match="hermes, llama3, mistral"):
        choose_tools("herms", tokenizer=Words(), chat_template="", model="")


def test_tools_are_written_out_for_templates_that_know_none() -> None:
    assert knows_tools("{% if tools %}") and not knows_tools("{{ messages }}") and not knows_tools(None)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "assistant", "content": "4."},
    ]
    out = written_out(messages, TOOLS)
    assert [message["role"] for message in out] == ["system", "user", "assistant", "user", "assistant"]
    assert '"get_weather"' in out[0]["content"] and "<tool_call>" in out[0]["content"]
    assert out[2]["content"].count('{"name": "add", "arguments": {"a": 1}}') == 2
    assert out[3]["content"].count("<tool_response>") == 2
    with_system = written_out([{"role": "system", "content": "Be kind."}, *messages], TOOLS)
    assert with_system[0]["content"].startswith("Be kind.\n\n") and len(with_system) == 5
