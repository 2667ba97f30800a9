"""Turning a growing list of token ids into text, never cutting a character in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

__all__ = ["Detokenizer"]

_BROKEN = "\ufffd"
#: Tokens of the longest character (4 bytes). A longer run that decodes to broken text is what the model wrote.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Incremental decoding of one completion.

    A token's text depends on its neighbours (spaces, bytes of one character), so each step decodes a short window: the
    tokens of the last piece given out, with and without the new ones. What the new ones add is the next piece, unless
    it ends inside a character: then it waits.

    Args:
        tokenizer: a transformers tokenizer.
        skip_special_tokens: leave end-of-text and the like out of the text.
        prompt: the tokens before. Some tokenizers write the space before a word only where something stands before it.
    """

    __slots__ = ("_decode", "_ids", "_prefix", "_read")

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        # transformers' own decode costs ten times as much per call as that of the library below it
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decode: Callable[..., str] = (tokenizer if backend is None else backend).decode
        self._decode = partial(decode, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._prefix = 0  # first token of the window
        if prompt:
            last = [int(prompt[-1])]
            if not self._decode(last).endswith(_BROKEN):  # half a character would be taken for a whole one
                self._ids = last
        self._read = len(self._ids)  # first token whose text was not given out

    def push(self, token_id: int) -> str:
        """Take one more token; returns the text that is now certain ('' while inside a character)."""
        self._ids.append(token_id)
        end = len(self._ids)
        before: str = self._decode(self._ids[self._prefix : self._read])
        now: str = self._decode(self._ids[self._prefix :])
        if now.endswith(_BROKEN):
            if end - self._read < _LONGEST_CHARACTER:
                return ""
            end = self._settled(now)
            now = self._decode(self._ids[self._prefix : end])
        if len(now) <= len(before) and now == before[: len(now)]:
            return ""  # a special token, or one that shows only with its successor
        self._prefix, self._read = self._read, end
        return now[len(before) :]

    def _settled(self, now: str) -> int:
        """Where a window whose text is ``now`` and ends broken can be cut: what follows the cut may still become a
        character, and no character, nor what broken bytes show as, lies across it."""
        end = len(self._ids)
        for cut in range(end - _LONGEST_CHARACTER + 1, end):
            if cut > self._read and self._decode(self._ids[self._prefix : cut]) + self._decode(self._ids[cut:]) == now:
                return cut
        return end

    def flush(self) -> str:
        """The text of what still waits; called once, when no token will follow."""
        if self._read == len(self._ids):
            return ""
        before: str = self._decode(self._ids[self._prefix : self._read])
        now: str = self._decode(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        return now[len(before) :]
