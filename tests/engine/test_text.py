"""Streamed text: characters are never cut, stop strings never shown in part."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dougong.engine.detokenizer import Detokenizer
from dougong.engine.prompt import PromptReader
from dougong.engine.stop_strings import StopStrings
from dougong.types import SamplingParams


class Bytes:
    """A tokenizer with one token per UTF-8 byte; id 256 is a special token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        out, run = "", b""
        for token in ids:
            if token == 256:
                out += run.decode(errors="replace") + ("" if skip_special_tokens else "<end>")
                run = b""
            else:
                run += bytes([token])
        return out + run.decode(errors="replace")


class Words:
    """Tokens whose space shows only after another token, as SentencePiece decodes."""

    words = ("▁the", "▁cat", "s", "▁é", "!")

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[token] for token in ids).replace("▁", " ").removeprefix(" ")


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole_and_no_piece_holds_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.lists(st.sampled_from("🙂é".encode() + b"a\xff"), max_size=40))
def test_broken_bytes_between_characters_come_out_as_decoding_the_whole_shows_them(data: list[int]) -> None:
    detokenizer = Detokenizer(Bytes())
    assert "".join(detokenizer.push(byte) for byte in data) + detokenizer.flush() == Bytes().decode(data)


@given(st.lists(st.integers(0, 4), max_size=12))
def test_a_leading_space_is_kept_between_tokens(ids: list[int]) -> None:
    detokenizer = Detokenizer(Words())
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == Words().decode(ids)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.lists(st.integers(0, 4), max_size=6))
def test_prompt_and_text_join_to_the_whole(prompt: list[int], ids: list[int]) -> None:
    """The space before the first word belongs to it, where a prompt stands before: no "France isParis"."""
    detokenizer = Detokenizer(Words(), prompt=prompt)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert Words().decode(prompt) + text == Words().decode(prompt + ids)


def test_after_a_special_token_or_half_a_character_text_begins_anew() -> None:
    for prompt in ([256], [0xF0]):
        detokenizer = Detokenizer(Bytes(), prompt=[65, *prompt])
        assert [detokenizer.push(token) for token in b"\xc3\xa9!"] == ["", "é", "!"]


def test_broken_bytes_come_out_in_the_end_and_special_tokens_only_when_asked() -> None:
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.flush() == "\ufffd"
    assert Detokenizer(Bytes(), skip_special_tokens=False).push(256) == "<end>"
    assert Detokenizer(Bytes()).push(256) == ""


def test_a_long_run_of_broken_bytes_does_not_wait_for_ever() -> None:
    detokenizer = Detokenizer(Bytes())
    assert "".join(detokenizer.push(0xFF) for _ in range(20)) != ""


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def test_bad_words_are_forbidden_at_the_start_and_after_a_space() -> None:
    reader = PromptReader(Letters(), 256, 64)
    found = reader.resolve(SamplingParams(bad_words=("cat", " dog"), bad_words_ids=((7,),)))
    assert found.bad_words_ids == ((7,), *(tuple(map(ord, word)) for word in ("cat", " cat", " dog")))
    assert found.bad_words == ()


def feed(stop: tuple[str, ...], pieces: list[str], include: bool = False) -> tuple[str, Any, list[str]]:
    watch, shown, seen = StopStrings(stop, include), "", []
    for piece in pieces:
        text, found = watch.push(piece)
        shown += text
        seen.append(text)
        if found is not None:
            return shown, found, seen
    return shown + watch.flush(), None, seen


def test_a_stop_string_across_pieces_is_found_and_never_shown() -> None:
    shown, found, seen = feed(("END",), ["ab E", "N", "D cd"])
    assert (shown, found) == ("ab ", "END")
    assert seen == ["ab ", "", ""]
    assert feed(("END",), ["ab E", "N", "D cd"], include=True)[0] == "ab END"


def test_text_that_only_began_like_a_stop_string_is_given_back() -> None:
    assert feed(("END",), ["E", "N", "X"])[:2] == ("ENX", None)
    assert feed(("END",), ["xEN"])[:2] == ("xEN", None)


def test_the_first_of_several_wins() -> None:
    assert feed(("b", "ab"), ["xxabyy"])[:2] == ("xx", "ab")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stopping_does_not_depend_on_how_the_text_was_cut(text: str, stop: list[str], data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    at = min((text.find(one) for one in stop if one in text), default=-1)
    shown, found, _ = feed(tuple(stop), pieces)
    if at < 0:
        assert (shown, found) == (text, None)
    else:
        # Cut finely, a longer stop string may be complete only after a shorter one that begins later.
        assert found is not None
        assert text.startswith(shown)
        assert text[len(shown) :].startswith(found)


@pytest.mark.parametrize("include", [True, False])
def test_flush_after_a_stop_gives_nothing_more(include: bool) -> None:
    watch = StopStrings(("x",), include)
    watch.push("axb")
    assert watch.flush() == ""
