"""One turn of a conversation as the server works on it, whichever API it came through, and the events of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from dougong.types import Logprob, SamplingParams

__all__ = [
    "ChatTurn",
    "Done",
    "EndReason",
    "Event",
    "Finished",
    "NamedTool",
    "ReasoningDelta",
    "Started",
    "TextDelta",
    "ToolCallDelta",
    "ToolChoice",
    "Usage",
]


class NamedTool(TypedDict):
    """The one tool that must be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool
EndReason = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class ChatTurn:
    """A conversation that waits for its next message. Checked only as far as its types say.

    ``messages`` and ``tools`` are in OpenAI's chat form: a message's content is a string or a list of parts.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    request_id: str
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    """OpenAI's form (``json_object``, ``json_schema``, ``text``); it becomes ``params.structured``."""
    reasoning: bool = True
    """Split thinking from the answer where the model marks it; False leaves it in the text."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as ``enable_thinking``."""
    chat_template: str | None = None
    """In place of the model's own."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The last message is the beginning of the answer, to be gone on with."""
    priority: int = 0
    cache_salt: str | None = None
    kv_transfer_params: Mapping[str, Any] | None = None
    """Where the prompt's KV comes from, as the engine that computed it has said."""
    trace: Mapping[str, str] | None = None
    """Trace context headers (W3C)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the request was checked and queued. Errors of the request are raised in its place."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache; 0 while it is not known. `Usage` has the last word."""
    usage: Callable[[], Usage] | None = None
    """The tokens of the request up to now, whenever it is called."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thinking that comes before the answer."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text.

    ``logprobs``: one entry for each token since the last event of this choice, the chosen token first in each; None
    where they were not asked for. They may come with an empty text.
    """

    choice: int
    text: str
    logprobs: Sequence[Mapping[int, Logprob]] | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a tool call. The first of an ``index`` has ``id`` and ``name``; ``arguments`` are pieces of JSON text."""

    choice: int
    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is over. ``stop_reason``: the stop string or token id that ended it, if one did."""

    choice: int
    reason: EndReason
    stop_reason: int | str | None = None
    error: str | None = None
    """The cause, when ``reason`` is ``error``."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last event."""

    usage: Usage
    kv_transfer_params: Mapping[str, Any] | None = None
    """What another engine needs to know to take this request's KV."""


Event = Started | ReasoningDelta | TextDelta | ToolCallDelta | Finished | Done
