"""Fields that OpenAI's requests have in common, and what they come to as sampling options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from dougong.errors import InvalidRequestError
from dougong.server.config import ServerConfig
from dougong.server.formats import read_structured
from dougong.types import SamplingParams

__all__ = ["GenerationFields", "StreamOptions", "check_fields"]

Ids = list[Annotated[int, Field(ge=0)]]
_INT64 = 1 << 63


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None
    """A last chunk with the tokens used, and no choices."""
    continuous_usage_stats: bool | None = None
    """The tokens used so far in every chunk."""
    include_obfuscation: bool | None = None
    """Accepted; chunks are not padded."""


class GenerationFields(BaseModel):
    """Sampling and stopping. Those after ``user`` are not OpenAI's; their names are vLLM's.

    Unknown fields are kept, so that `check_fields` can name them.
    """

    model_config = ConfigDict(extra="allow", strict=False)

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(ge=0, lt=_INT64)], float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=2 * _INT64)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    """Accepted; nothing is made of it."""

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Ids | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: Ids | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: Annotated[int, Field(ge=-_INT64, lt=_INT64)] = 0
    """Lower goes first; refused unless the server was started with ``--scheduling-policy priority``."""
    cache_salt: str | None = None
    """Requests share cached prefixes only with those of the same salt."""
    request_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """In place of the server's own; it must not be in use."""
    kv_transfer_params: dict[str, JsonValue] | None = None
    """As a prefill server's answer has them; refused by a server without ``--kv-connector``."""
    structured_outputs: dict[str, JsonValue] | None = None
    """What the text must look like: one of ``json``, ``json_object``, ``regex``, ``choice``, ``grammar``."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Clients that write out all fields they know mean by null that they leave one out."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    def params(self, config: ServerConfig, defaults: Mapping[str, float | int], **more: Any) -> SamplingParams:
        """The sampling options, with the model's own defaults where the request says nothing.

        Raises:
            InvalidRequestError: a value is out of range, or beyond the server's limits.
        """
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stop) > config.max_stop:
            raise InvalidRequestError(f"stop: {len(stop)} strings; at most {config.max_stop} are allowed.")
        if any(len(text) > _LONGEST_STOP for text in stop):
            raise InvalidRequestError(f"stop: a string of more than {_LONGEST_STOP} characters.")
        for name in ("bad_words", "stop_token_ids", "allowed_token_ids", "logit_bias"):
            if len(getattr(self, name) or ()) > _MOST_ENTRIES:
                raise InvalidRequestError(f"{name}: more than {_MOST_ENTRIES} entries.")
        n = self.n if self.n is not None else 1
        if n > config.max_choices:
            raise InvalidRequestError(f"n={n}: at most {config.max_choices} choices are allowed.")
        options: dict[str, Any] = dict(defaults)
        for name in _PASSED:
            value = getattr(self, name)
            if value is not None:
                options[name] = value
        options |= {
            "n": n,
            "stop": tuple(text for text in stop if text),
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
            "max_tokens": self.max_tokens,
            "structured": read_structured(self.structured_outputs),
        } | more
        return SamplingParams(**options)


_LONGEST_STOP = 1000
_MOST_ENTRIES = 2048
_PASSED = (
    "allowed_token_ids", "bad_words", "frequency_penalty", "logit_bias", "min_p", "min_tokens", "presence_penalty",
    "repetition_penalty", "seed", "stop_token_ids", "temperature", "top_k", "top_p",
)  # fmt: skip


def check_fields(
    request: BaseModel, config: ServerConfig, refused: Mapping[str, str], accepted: frozenset[str]
) -> None:
    """Fields that the model of the request does not have.

    Args:
        refused: fields that would change the answer and cannot be served: name -> what to do.
        accepted: fields without a meaning here, such as ``metadata``.

    Raises:
        InvalidRequestError: names the field, and the nearest that exists.
    """
    for name, value in (request.model_extra or {}).items():
        if value is None or name in accepted:
            continue
        if name in refused:
            raise _refusal(name, f"{name} is not supported: {refused[name]}")
        if config.unknown_fields == "refuse":
            near = difflib.get_close_matches(name, type(request).model_fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise _refusal(name, f"unknown field {name!r}.{hint}")


def _refusal(name: str, text: str) -> InvalidRequestError:
    error = InvalidRequestError(text)
    error.param = name  # type: ignore[attr-defined]  # read by as_api_error
    return error
