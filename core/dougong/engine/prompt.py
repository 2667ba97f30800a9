"""From what a user gives as a prompt to token ids and checked sampling options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from dougong.errors import InvalidRequestError
from dougong.types import SamplingParams

__all__ = ["Prompt", "PromptReader", "TokensPrompt", "check_unicode"]


class TokensPrompt(TypedDict, total=False):
    """A prompt as a mapping: ``prompt_token_ids``, or ``prompt`` (text), what changes its KV, and where it comes from:
    ``kv_transfer_params`` promise that ``num_tokens`` positions are there, or will be within ``wait_s`` seconds."""

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str
    kv_transfer_params: dict[str, Any]


#: Bad words of one request. The device keeps as many of everybody's last tokens as the longest word has, and compares
#: them with every word in each step.
_LONGEST_WORD = 128
_MOST_WORDS = 8_192

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt's text where known, its token ids, and its tenant's salt."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None
    kv_transfer_params: Mapping[str, Any] | None = None


class PromptReader:
    """Tokenises and checks. ``tokenizer`` is None when the engine was told to skip it."""

    def __init__(self, tokenizer: Any, vocab_size: int, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len

    def read(self, prompt: Prompt) -> ReadPrompt:
        """Token ids of a prompt.

        Raises:
            InvalidRequestError: it is empty, of a wrong type, holds ids outside the vocabulary, or leaves the context
                no room for a token.
        """
        text, ids, salt = self._split(prompt)
        if ids is None:
            assert text is not None, "_split gives one of them"
            if self.tokenizer is None:
                raise InvalidRequestError(
                    "a prompt was given as text, and the engine has no tokenizer (skip_tokenizer_init=True). "
                    'Give token ids: {"prompt_token_ids": [...]}.'
                )
            check_unicode("the prompt", text)
            ids = list(self.tokenizer(text)["input_ids"])
        if not ids:
            raise InvalidRequestError("the prompt is empty: give at least one character or token id.")
        # Built-ins over the whole list: a loop over all tokens of a large batch would delay its first step.
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(token for token in ids if type(token) is not int or not 0 <= token < self.vocab_size)
            raise InvalidRequestError(
                f"prompt token id {wrong!r}: allowed are integers from 0 to {self.vocab_size - 1}."
            )
        if len(ids) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; the context holds {self.max_model_len}, one of them for the "
                "answer. Shorten the prompt, or raise max_model_len as far as the model and the KV cache allow."
            )
        params = _transfer_params(prompt)
        return ReadPrompt(text, ids, salt, params)

    def _split(self, prompt: Prompt) -> tuple[str | None, list[int] | None, str | None]:
        if isinstance(prompt, str):
            return prompt, None, None
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt", "kv_transfer_params"}
            if unknown or not ({"prompt", "prompt_token_ids"} & set(prompt)):
                raise InvalidRequestError(
                    f"a prompt mapping has the keys {sorted(prompt)}; allowed are 'prompt' or 'prompt_token_ids', "
                    "'cache_salt' and 'kv_transfer_params'."
                )
            text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
            for name, value in (("prompt", text), ("cache_salt", salt)):
                if value is not None and not isinstance(value, str):
                    raise InvalidRequestError(f"{name}={value!r} of a prompt mapping: give a string.")
            if isinstance(ids, (str, bytes, bytearray, Mapping)) or not (ids is None or isinstance(ids, Iterable)):
                raise InvalidRequestError(f"prompt_token_ids={ids!r} of a prompt mapping: give a list of token ids.")
            if text is None and ids is None:
                raise InvalidRequestError("a prompt mapping with nothing in it: give 'prompt' or 'prompt_token_ids'.")
            if salt is not None:
                check_unicode("cache_salt", salt)
            return text, None if ids is None else list(ids), salt
        if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray)):
            return None, list(prompt), None
        raise InvalidRequestError(
            f"a prompt of type {type(prompt).__name__}: give a string, a list of token ids, or a mapping with "
            "'prompt' or 'prompt_token_ids'."
        )

    def resolve(self, sampling: SamplingParams) -> SamplingParams:
        """Check the options against the model, and turn bad words into ids.

        Raises:
            InvalidRequestError: not sampling options, token ids outside the vocabulary, or too many log-probabilities.
        """
        if not isinstance(sampling, SamplingParams):
            raise InvalidRequestError(f"sampling options of type {type(sampling).__name__}: give a SamplingParams.")
        changes: dict[str, Any] = {}
        if sampling.bad_words:
            changes["bad_words_ids"] = sampling.bad_words_ids + self._words(sampling.bad_words)
            changes["bad_words"] = ()
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(sampling, name) or ():
                if token >= self.vocab_size:
                    raise InvalidRequestError(
                        f"SamplingParams({name}=…) holds token id {token}: allowed are 0 to {self.vocab_size - 1}."
                    )
        self._check_words(changes.get("bad_words_ids", sampling.bad_words_ids))
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(sampling, name)
            if asked is not None and asked > self.vocab_size:
                raise InvalidRequestError(
                    f"SamplingParams({name}={asked}): the vocabulary has {self.vocab_size} tokens; -1 asks for all."
                )
        return replace(sampling, **changes) if changes else sampling

    def _check_words(self, words: tuple[tuple[int, ...], ...]) -> None:
        for word in words:
            if max(word) >= self.vocab_size:
                raise InvalidRequestError(
                    f"SamplingParams(bad_words_ids=…) holds {word}: allowed are ids 0 to {self.vocab_size - 1}."
                )
        longest = max(map(len, words), default=0)
        if longest > _LONGEST_WORD or len(words) > _MOST_WORDS:
            raise InvalidRequestError(
                f"SamplingParams(bad_words=…): {len(words)} sequences of up to {longest} tokens; allowed are "
                f"{_MOST_WORDS} of up to {_LONGEST_WORD} each."
            )

    def _words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is written at the start of a text and after a space."""
        if self.tokenizer is None:
            raise InvalidRequestError(
                "bad_words need a tokenizer, and the engine has none (skip_tokenizer_init=True). Give bad_words_ids."
            )
        found: list[tuple[int, ...]] = []
        for word in words:
            for form in (word, " " + word.lstrip()):
                ids = tuple(self.tokenizer(form, add_special_tokens=False)["input_ids"])
                if ids and ids not in found:
                    found.append(ids)
        return tuple(found)


def check_unicode(what: str, text: str) -> None:
    """Raises:
    InvalidRequestError: ``text`` has surrogates without their other half, which are no characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}. Give whole characters."
        ) from None


def _transfer_params(prompt: Prompt) -> Mapping[str, Any] | None:
    """What the prompt says of KV that was computed elsewhere; keys that a connector added are let pass.

    Raises:
        InvalidRequestError: it is no mapping, or a number in it cannot be.
    """
    params = prompt.get("kv_transfer_params") if isinstance(prompt, Mapping) else None
    if params is None:
        return None
    if isinstance(params, Mapping):
        tokens, wait = params.get("num_tokens", 0), params.get("wait_s", 0.0)
        whole = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
        if whole and isinstance(wait, (int, float)) and not isinstance(wait, bool) and 0 <= wait < 3600:
            return params
    raise InvalidRequestError(
        f"kv_transfer_params={params!r}: allowed is a mapping with 'num_tokens' (an integer >= 0) and 'wait_s' "
        "(seconds, 0 to 3600), as the output of the engine that computed the KV has it."
    )
