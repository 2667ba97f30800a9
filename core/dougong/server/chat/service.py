"""`ChatService`: a turn in, events out. Every chat API goes through it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from dougong.errors import ConfigError
from dougong.server.chat.dialect import Dialect
from dougong.server.chat.turn import ChatTurn, Done, Event, Started, Usage
from dougong.server.config import ServerConfig
from dougong.server.limits import QueueLimit
from dougong.server.process.client import EngineClient
from dougong.server.streaming import first_then
from dougong.types import RequestOutput

__all__ = ["ChatService"]


class ChatService:
    """Template, engine, and the split of what comes back into thinking, text and tool calls.

    Raises:
        ConfigError: the chat template cannot be read, or an option names a parser that does not exist.
    """

    def __init__(self, config: ServerConfig, client: EngineClient, queue: QueueLimit) -> None:
        self._config = config
        self._client = client
        self._queue = queue
        self._template = None if config.chat_template is None else _read(config.chat_template)
        self.dialect = Dialect(config, client.tokenizer, self._template)

    async def render(self, turn: ChatTurn) -> tuple[str, list[int]]:
        """The turn as the model reads it: (text, token ids).

        Raises:
            InvalidRequestError: the model has no chat template, or it does not accept the messages.
        """
        turn = self.dialect.adapt(turn)
        return await self._client.texts.chat(
            turn.messages,
            tools=turn.tools if turn.tool_choice != "none" else (),
            chat_template=turn.chat_template or self._template,
            add_generation_prompt=turn.add_generation_prompt,
            continue_final_message=turn.continue_final_message,
            template_kwargs=turn.template_kwargs,
        )

    async def run(self, turn: ChatTurn) -> AsyncGenerator[Event, None]:
        """The answer, event by event: `Started` first, `Done` last. Closing the iterator ends the request.

        A choice that fails ends with ``Finished(reason="error")``; the others go on.

        Raises:
            InvalidRequestError: it can never be served. Raised in place of `Started`.
            ApiError: 429, the queue is full. Raised in place of `Started`.
            EngineDownError: there is no engine.
        """
        with self._queue.room(turn.params.n):
            text, ids = await self.render(turn)
            params = self.dialect.params(turn, text)
            self._client.check(
                ids, params, request_id=turn.request_id, priority=turn.priority,
                kv_transfer_params=turn.kv_transfer_params,
            )  # fmt: skip
            await self._client.ready(self._config.request_timeout_s)
        answers = [self.dialect.answer(turn, index, text) for index in range(params.n)]
        final: RequestOutput | None = None
        outputs = self._client.generate(
            ids,
            params,
            request_id=turn.request_id,
            priority=turn.priority,
            cache_salt=turn.cache_salt,
            kv_transfer_params=turn.kv_transfer_params,
            trace=turn.trace,
            timeout_s=self._config.request_timeout_s,
        )

        def usage() -> Usage:
            completions = () if final is None else final.outputs
            return Usage(
                len(ids),
                sum(len(completion.token_ids) for completion in completions),
                0 if final is None else final.num_cached_tokens,
                sum(answer.reasoning_tokens for answer in answers),
            )

        if params.structured is not None:
            outputs = await first_then(outputs)  # only the engine knows whether it can be compiled
        async with aclosing(outputs):
            yield Started(len(ids), usage=usage)
            async for final in outputs:
                for answer, completion in zip(answers, final.outputs):
                    for event in answer.read(completion):
                        yield event
        assert final is not None
        yield Done(usage(), final.kv_transfer_params)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={path!r}: {error}") from error
