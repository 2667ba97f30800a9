"""Tokenising and chat templates, on a thread of their own: they cost milliseconds, the event loop has microseconds."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dougong.engine.prompt import check_unicode
from dougong.errors import InvalidRequestError

__all__ = ["TextWorker"]

T = TypeVar("T")


class TextWorker:
    """Turns text into token ids. ``tokenizer`` itself is left to the event loop's thread, for decoding.

    The thread has a copy: the library below locks a tokenizer while it encodes, and a decode that comes then fails.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._own = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dougong-text")

    async def run(self, function: Callable[[Any], T]) -> T:
        """``function(tokenizer)`` on the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._own)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Raises:
            InvalidRequestError: it is no Unicode text (lone surrogates).
        """
        check_unicode("the text", text)
        ids: list[int] = await self.run(
            lambda tokenizer: tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        )
        return list(ids)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """A conversation through the chat template: (text, token ids).

        Raises:
            InvalidRequestError: there is no template, or it does not accept these messages.
        """
        if chat_template is None and not getattr(self.tokenizer, "chat_template", None):
            raise InvalidRequestError(
                "the model has no chat template, so it cannot be asked through the chat API. Use /v1/completions, or "
                "start the server with --chat-template FILE."
            )

        def work(tokenizer: Any) -> tuple[str, list[int]]:
            try:
                text = tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    tools=[dict(tool) for tool in tools] or None,
                    chat_template=chat_template,
                    **(template_kwargs or {}),
                )
            except Exception as error:
                # A template says "roles must alternate" and the like by an exception of jinja's.
                raise InvalidRequestError(
                    f"the chat template does not accept these messages: {type(error).__name__}: {error}"
                ) from error
            check_unicode("the text", text)
            return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])

        return await self.run(work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
