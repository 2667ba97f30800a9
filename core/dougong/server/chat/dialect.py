"""How the served model writes tool calls and thinking, and what that means for a turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dougong.errors import InvalidRequestError
from dougong.server.chat.answer import Answer
from dougong.server.chat.turn import ChatTurn
from dougong.server.config import ServerConfig
from dougong.server.formats import combined, read_response_format
from dougong.server.reasoning import choose_reasoning
from dougong.server.tools import choose_tools
from dougong.server.tools.prompting import knows_tools, written_out
from dougong.types import SamplingParams

__all__ = ["Dialect"]


class Dialect:
    """Chosen once, from the options, the chat template and the model's name.

    Args:
        chat_template: the operator's, in place of the tokenizer's.

    Raises:
        ConfigError: an option names a format that is not there.
    """

    def __init__(self, config: ServerConfig, tokenizer: Any, chat_template: str | None = None) -> None:
        self._template = chat_template or _own_template(tokenizer)
        model = config.engine.model
        self.tools = choose_tools(
            config.tool_call_parser, tokenizer=tokenizer, chat_template=self._template, model=model
        )
        self.reasoning = choose_reasoning(config.reasoning_parser, chat_template=self._template, model=model)

    def adapt(self, turn: ChatTurn) -> ChatTurn:
        """The turn with nothing in it that the chat template does not know.

        Raises:
            InvalidRequestError: tools, and the server finds no calls.
        """
        tools = () if turn.tool_choice == "none" else turn.tools
        if tools and self.tools is None:
            raise InvalidRequestError(
                "tools: this server was started with --tool-call-parser none, so it finds no calls."
            )
        if knows_tools(turn.chat_template or self._template):
            return turn
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in turn.messages):
            return replace(turn, messages=written_out(turn.messages, tools))
        return turn

    def params(self, turn: ChatTurn, prompt: str) -> SamplingParams:
        """The turn's sampling options, with the form that the answer must have.

        Raises:
            InvalidRequestError: the response format is wrong, or stands beside another form.
        """
        params = turn.params
        form = read_response_format(turn.response_format)
        if form is not None and params.structured is not None:
            raise InvalidRequestError("response_format and structured_outputs say different things: give one of them.")
        form = form or params.structured
        calls = None
        if turn.tools and turn.tool_choice != "none":
            assert self.tools is not None
            if self.tools.keeps_special:
                params = replace(params, skip_special_tokens=False)
            if turn.tool_choice != "auto" or form is not None:
                calls = self.tools.grammar(turn.tools, turn.tool_choice, turn.parallel_tool_calls)
        if turn.tool_choice not in ("auto", "none"):
            form = None
        structured = combined(form, calls, self.reasoning, prompt)
        return params if structured is params.structured else replace(params, structured=structured)

    def answer(self, turn: ChatTurn, index: int, prompt: str) -> Answer:
        """A choice's reader. ``prompt``: the rendered text, which may end inside an open thinking mark."""
        splitter = self.reasoning.splitter(prompt) if self.reasoning is not None and turn.reasoning else None
        calls = turn.tools and turn.tool_choice != "none" and self.tools is not None
        return Answer(index, splitter, self.tools.parser(turn.tools) if calls and self.tools is not None else None)


def _own_template(tokenizer: Any) -> str:
    """The tokenizer's chat template; of several, all of them."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template or ""
