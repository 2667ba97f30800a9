"""How the next token is chosen and when a completion ends, with the names users know from vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.types.structured import StructuredOutput

__all__ = ["GREEDY_EPSILON", "SamplingParams"]

#: A temperature below this is greedy. Dividing logits by less would overflow in half precision.
GREEDY_EPSILON = 1e-5
#: Completions of one request: each is set up before the next step may run.
MOST_COMPLETIONS = 16_384


def _refuse(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"SamplingParams({name}={value!r}): allowed is {allowed}.")


def _number(name: str, value: Any, low: float, high: float, allowed: str, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(name, value, allowed)
    if not low <= value <= high or (open_low and value == low):  # so written, it refuses NaN too
        raise _refuse(name, value, allowed)
    return float(value)


def _integer(name: str, value: Any, low: int, allowed: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _refuse(name, value, allowed)
    return value


def _ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise _refuse(name, values, "a sequence of token ids (integers >= 0)")
    out = tuple(values)
    for value in out:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _refuse(name, out, "a sequence of token ids (integers >= 0)")
    return out


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, Iterable):
        raise _refuse(name, values, "a non-empty string or a sequence of them")
    out = (values,) if isinstance(values, str) else tuple(values)
    for value in out:
        if not isinstance(value, str) or not value:
            raise _refuse(name, values, "a non-empty string or a sequence of them")
    return out


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping options of one request. Immutable; validated when made.

    Raises:
        InvalidRequestError: a value is out of range; the message says what is allowed.
    """

    n: int = 1
    """Completions per prompt. They share the prompt's KV blocks."""
    temperature: float = 1.0
    """0 is greedy and exact."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    """With a seed a request's tokens do not depend on what shares its batch (given equal logits)."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not be completed; ``bad_words`` is turned into these by the engine."""
    allowed_token_ids: tuple[int, ...] | None = None
    structured: StructuredOutput | None = None
    """What the text must look like; the completion ends when that is complete."""
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as the context allows."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Number of top log-probabilities per generated token (0: only the chosen one; -1: the vocabulary)."""
    prompt_logprobs: int | None = None
    pooling: str | None = None
    """``last``, ``mean`` or ``cls`` (the first token): the request gives this vector of the prompt's final hidden
    states, ``RequestOutput.embedding``, in place of tokens. Not of length 1 (`dougong.engine.vectors.unit`)."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Read by plugins; the core ignores it."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        if _integer("n", self.n, 1, f"an integer from 1 to {MOST_COMPLETIONS:,}") > MOST_COMPLETIONS:
            raise _refuse("n", self.n, f"an integer from 1 to {MOST_COMPLETIONS:,}")
        put(self, "temperature", _number("temperature", self.temperature, 0.0, 1e6, "a number >= 0"))
        put(self, "top_p", _number("top_p", self.top_p, 0.0, 1.0, "a number in (0, 1]", open_low=True))
        _integer("top_k", self.top_k, -1, "an integer >= 1, or 0 or -1 for all tokens")
        put(self, "min_p", _number("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]"))
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, "a number > 0", open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "a number in [-2, 2]")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "a number in [-2, 2]")
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), "an integer of 64 bits or None")
            if self.seed >= 1 << 64:
                raise _refuse("seed", self.seed, "an integer of 64 bits or None")
        put(self, "stop", _strings("stop", self.stop))
        put(self, "bad_words", _strings("bad_words", self.bad_words))
        # vLLM's defaults are None where ours are empty.
        put(self, "stop_token_ids", _ids("stop_token_ids", () if self.stop_token_ids is None else self.stop_token_ids))
        words: Any = () if self.bad_words_ids is None else self.bad_words_ids
        if not isinstance(words, Iterable):
            raise _refuse("bad_words_ids", words, "sequences of at least one token id")
        put(self, "bad_words_ids", tuple(_ids("bad_words_ids", word) for word in words))
        if any(not word for word in self.bad_words_ids):
            raise _refuse("bad_words_ids", self.bad_words_ids, "sequences of at least one token id")
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise _refuse("allowed_token_ids", self.allowed_token_ids, "None or at least one token id")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise _refuse("structured", self.structured, "None or a StructuredOutput")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, "an integer >= 1, or None for what the context allows")
        _integer("min_tokens", self.min_tokens, 0, "an integer >= 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), -1, "an integer >= 0, -1 for the vocabulary, or None")
        if self.pooling is not None:
            if self.pooling not in ("last", "mean", "cls"):
                raise _refuse("pooling", self.pooling, "None, 'last', 'mean' or 'cls'")
            if self.n != 1 or self.max_tokens != 1:
                raise _refuse("pooling", self.pooling, "n=1 and max_tokens=1 beside it: a prompt has one vector")
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                f"SamplingParams(stop={self.stop!r}, detokenize=False): stop strings are found in the text. "
                "Leave detokenize on, or use stop_token_ids."
            )
        self._check_bias()

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        allowed = "a mapping from token id (integer >= 0) to a bias in [-100, 100]"
        if not isinstance(self.logit_bias, Mapping):
            raise _refuse("logit_bias", self.logit_bias, allowed)
        clean: dict[int, float] = {}
        items: Iterable[tuple[Any, Any]] = self.logit_bias.items()
        for key, bias in items:
            # JSON has only string keys: OpenAI's clients send them so.
            token = int(key) if isinstance(key, str) and key.isdigit() else key
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise _refuse("logit_bias", dict(self.logit_bias), allowed)
            clean[token] = _number("logit_bias", bias, -100.0, 100.0, allowed)
        object.__setattr__(self, "logit_bias", clean)

    @property
    def wants_whole_prompt(self) -> bool:
        """Whether every prompt token must be computed, also those whose KV is cached."""
        return self.prompt_logprobs is not None or self.pooling in ("mean", "cls")

    @property
    def greedy(self) -> bool:
        """Whether the arg max is taken."""
        return self.temperature < GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
