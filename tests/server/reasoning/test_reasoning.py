"""Thinking is told from the answer however the text comes in pieces."""

from __future__ import annotations

import pytest

from dougong.errors import ConfigError
from dougong.server.reasoning import REASONING_FORMATS, choose_reasoning

#: name -> (format, end of the prompt, text, thinking, answer)
CASES: dict[str, tuple[str, str, str, str, str]] = {
    "marked": ("think", "", "<think>\nIt is 4.\n</think>\n\nThe answer is 4.\n", "It is 4.", "The answer is 4.\n"),
    "white-space-first": ("think", "", "\n <think>a</think>b", "a", "b"),
    "no-thought": ("think", "", "4 is <think>not</think> hard", "", "4 is <think>not</think> hard"),
    "nearly": ("think", "", "<thin ice>", "", "<thin ice>"),
    "empty": ("think", "", "<think>\n\n</think>\n\nyes", "", "yes"),
    "inside": ("think", "<think>\n", "hm <b> </thin </think>\nyes </think>", "hm <b> </thin", "yes </think>"),
    "inside-and-again": ("think", "<think>", "<think>\nhm</think>yes", "hm", "yes"),
    "closed-in-the-prompt": ("think", "<think>\n\n</think>\n\n", "yes", "", "yes"),
    "cut-off": ("think", "<think>\n", "hm, and then </th", "hm, and then </th", ""),
    "always-inside": ("think-inside", "", "hm</think>yes", "hm", "yes"),
    "magistral": ("magistral", "", "[THINK]hm\n\nhm[/THINK]yes", "hm\n\nhm", "yes"),
    "paragraphs": ("think", "", "<think>a\n\n\nb c\n</think>d\n\ne ", "a\n\n\nb c", "d\n\ne "),
}


@pytest.mark.parametrize("case", CASES)
def test_however_it_comes(case: str) -> None:
    name, prompt, text, thinking, answer = CASES[case]
    cuts = [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]
    for chunks in cuts:
        splitter = REASONING_FORMATS[name].splitter("[user] hi\n" + prompt)
        shown = {"reasoning": "", "text": ""}
        for pieces in [*map(splitter.feed, chunks), splitter.finish()]:
            for kind, piece in pieces:
                assert piece
                shown[kind] += piece
                assert thinking.startswith(shown["reasoning"]) and answer.startswith(shown["text"]), chunks
        assert shown == {"reasoning": thinking, "text": answer}, chunks


def test_the_format_is_seen_or_named() -> None:
    def chosen(name: str | None, template: str = "", model: str = "") -> str | None:
        found = choose_reasoning(name, chat_template=template, model=model)
        return None if found is None else found.name

    assert chosen(None, "… </think> …") == "think"
    assert chosen("auto", "… [THINK] …") == "magistral"
    assert chosen(None, model="Qwen/Qwen3-0.6B") == "think"
    assert chosen(None, "{{ messages }}", "smollm2") is None
    assert chosen("none", "<think>") is None
    assert chosen("think-inside") == "think-inside"
    with pytest.raises(ConfigError, match="magistral"):
        chosen("thinking")
