"""Log-probabilities in the two forms that OpenAI has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from dougong.types import Logprob

__all__ = ["chat_logprobs", "completion_logprobs", "token_bytes"]

_BROKEN = "\ufffd"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: JSON has no infinity; OpenAI writes this for a token that cannot come.
_NEVER = -9999.0


@lru_cache(1)
def _byte_letters() -> dict[str, int]:
    """Letter -> byte, of byte-level BPE vocabularies: printable bytes stand for themselves, others were moved."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(moved)}


def token_bytes(tokenizer: Any, token_id: int, text: str) -> list[int]:
    """The bytes of a token, also of one that holds part of a character."""
    if _BROKEN not in text:
        return list(text.encode())
    name = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(name, str):
        return list(text.encode())
    single = _FALLBACK.fullmatch(name)
    if single is not None:
        return [int(single[1], 16)]
    letters = _byte_letters()
    if all(letter in letters for letter in name):
        return [letters[letter] for letter in name]
    return list(text.encode())


def _number(logprob: float) -> float:
    return max(logprob, _NEVER)


def chat_logprobs(entries: Iterable[Mapping[int, Logprob]], top: int, tokenizer: Any) -> dict[str, Any]:
    """``{"content": [...], "refusal": None}``: the chosen token of each position, and its ``top`` likeliest."""
    content = []
    for entry in entries:
        (chosen, own), *_ = entry.items()
        ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)[:top]
        content.append(
            _token(chosen, own, tokenizer) | {"top_logprobs": [_token(i, one, tokenizer) for i, one in ranked]}
        )
    return {"content": content, "refusal": None}


def _token(token_id: int, one: Logprob, tokenizer: Any) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {"token": text, "logprob": _number(one.logprob), "bytes": token_bytes(tokenizer, token_id, text)}


def completion_logprobs(
    entries: Sequence[Mapping[int, Logprob] | None], ids: Sequence[int], top: int, tokenizer: Any, offset: int = 0
) -> dict[str, Any]:
    """The older form: parallel lists. A prompt's first token has none. ``offset``: characters before the first."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entry in zip(ids, entries):
        text = (entry[token_id].decoded_token if entry is not None else None) or tokenizer.decode([token_id])
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if entry is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(_number(entry[token_id].logprob))
        ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)[:top]
        shown: dict[str, float] = {}
        for _, one in ranked:
            shown.setdefault(one.decoded_token or "", _number(one.logprob))
        tops.append(shown)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops if top else None, "text_offset": offsets}
