"""One choice of an answer: from text that grows to events, through the reasoning splitter and the tool parser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from dougong.server.chat.turn import EndReason, Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from dougong.types import CompletionOutput, FinishReason

__all__ = ["Answer", "Splitter", "ToolReader"]


class Splitter(Protocol):
    """Tells thinking from the answer; holds back what may be the beginning of a mark."""

    def feed(self, text: str) -> Sequence[tuple[Literal["reasoning", "text"], str]]: ...

    def finish(self) -> Sequence[tuple[Literal["reasoning", "text"], str]]: ...


class ToolReader(Protocol):
    """Finds tool calls in the answer's text; holds back what may be the beginning of one. ``choice`` is left 0."""

    def feed(self, text: str) -> Iterable[TextDelta | ToolCallDelta]: ...

    def finish(self) -> Iterable[TextDelta | ToolCallDelta]: ...


class Answer:
    """Turns each state of a completion into what is new since the last one."""

    def __init__(self, choice: int, splitter: Splitter | None, tools: ToolReader | None) -> None:
        self.choice = choice
        self.reasoning_tokens = 0
        self.finished = False
        self._splitter = splitter
        self._tools = tools
        self._sent = 0
        self._scored = 0
        self._tokens = 0
        self._thinking = False
        self._called = False

    def read(self, completion: CompletionOutput) -> list[Event]:
        """Events for what came since the last call; the last one of all is `Finished`."""
        if self.finished:
            return []
        text = completion.text[self._sent :]
        self._sent += len(text)
        done = completion.finish_reason is not None
        if not text and not done and completion.logprobs is None:
            return []
        events: list[Event] = []
        pieces: list[tuple[Literal["reasoning", "text"], str]] = []
        if self._splitter is None:
            pieces.append(("text", text))
        else:
            pieces += self._splitter.feed(text) if text else ()
            if done:
                pieces += self._splitter.finish()
        self._count_reasoning(completion, pieces)
        for kind, piece in pieces:
            if not piece:
                continue
            if kind == "reasoning":
                events.append(ReasoningDelta(self.choice, piece))
            else:
                self._add_text(events, piece)
        if done and self._tools is not None:
            self._take(events, self._tools.finish())
        self._add_scores(events, completion)
        if done:
            self.finished = True
            events.append(Finished(self.choice, self._reason(completion), completion.stop_reason, completion.error))
        return events

    def _add_text(self, events: list[Event], text: str) -> None:
        if self._tools is None:
            events.append(TextDelta(self.choice, text))
        else:
            self._take(events, self._tools.feed(text))

    def _take(self, events: list[Event], found: Iterable[TextDelta | ToolCallDelta]) -> None:
        for piece in found:
            self._called = self._called or isinstance(piece, ToolCallDelta)
            events.append(replace(piece, choice=self.choice))

    def _add_scores(self, events: list[Event], completion: CompletionOutput) -> None:
        """Log-probabilities go with the first text of this state, or alone if there is none."""
        if completion.logprobs is None or len(completion.logprobs) == self._scored:
            return
        scores = completion.logprobs[self._scored :]
        self._scored = len(completion.logprobs)
        for place, event in enumerate(events):
            if isinstance(event, TextDelta):
                events[place] = replace(event, logprobs=scores)
                return
        events.append(TextDelta(self.choice, "", scores))

    def _count_reasoning(self, completion: CompletionOutput, pieces: Sequence[tuple[str, str]]) -> None:
        new, self._tokens = len(completion.token_ids) - self._tokens, len(completion.token_ids)
        for kind, _ in pieces:
            self._thinking = kind == "reasoning"
        if self._thinking:
            self.reasoning_tokens += new

    def _reason(self, completion: CompletionOutput) -> EndReason:
        reason = completion.finish_reason
        assert reason is not None
        if reason is FinishReason.STOP and self._called:
            return "tool_calls"
        return reason.value
