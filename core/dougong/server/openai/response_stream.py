"""A response while it is made: whole, or as the Responses API's events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from dougong.server.chat.blocks import Block, Closed, Grown, Opened, Part, in_blocks
from dougong.server.chat.turn import Done, Event, Finished, Started, Usage
from dougong.server.errors import ApiError, as_api_error
from dougong.server.openai.chat import choice_failed
from dougong.server.openai.logprobs import chat_logprobs
from dougong.server.openai.response_items import item_of, text_part
from dougong.server.streaming import sse

__all__ = ["ResponseWriter"]


class ResponseWriter:
    """Puts one response together.

    Args:
        head: the response object without an answer; it becomes the finished one.
        keep: called with it once it is finished.
        tokenizer: for the text of log-probabilities; None where they were not asked for.
    """

    def __init__(self, head: dict[str, Any], keep: Callable[[dict[str, Any]], None], tokenizer: Any) -> None:
        self._body = head
        self._keep = keep
        self._tokenizer = tokenizer
        self._names: list[str] = []
        self._items: list[dict[str, Any]] = []
        self._end: Finished | None = None
        self._count = 0

    async def whole(self, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        """The finished response.

        Raises:
            ApiError: the engine failed.
        """
        async with aclosing(in_blocks(events)) as parts:
            async for event in parts:
                if isinstance(event, Opened):
                    self._names.append(uuid.uuid4().hex)
                elif isinstance(event, Closed):
                    self._items.append(self._item(event.block, "completed"))
                elif isinstance(event, Finished):
                    failure = choice_failed(event)
                    if failure is not None:
                        raise failure
                    self._end = event
                elif isinstance(event, Done):
                    self._finish(event.usage)
        return self._body

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """Events, numbered; a failure in mid-stream ends them with ``response.failed``."""
        try:
            async with aclosing(in_blocks(events)) as parts:
                async for event in parts:
                    for chunk in self._chunks(event):
                        yield chunk
        except Exception as error:
            failure = as_api_error(error)
            yield self._failed(failure)

    def _chunks(self, event: Part) -> list[bytes]:
        if isinstance(event, Started):
            return [self._event(f"response.{kind}", response=self._body) for kind in ("created", "in_progress")]
        if isinstance(event, Opened):
            return self._opened(event.block)
        if isinstance(event, Grown):
            return self._grown(event)
        if isinstance(event, Closed):
            return self._closed(event.block)
        if isinstance(event, Finished):
            failure = choice_failed(event)
            if failure is not None:
                raise failure
            self._end = event
            return []
        self._finish(event.usage)
        return [self._event(f"response.{self._body['status']}", response=self._body)]

    def _opened(self, block: Block) -> list[bytes]:
        self._names.append(uuid.uuid4().hex)
        item = self._item(block, "in_progress")
        out = [self._event("response.output_item.added", output_index=block.place, item=item)]
        if block.kind != "call":
            part = {"type": "reasoning_text", "text": ""} if block.kind == "reasoning" else text_part("", [])
            out.append(self._event("response.content_part.added", **self._at(block), part=part))
        return out

    def _grown(self, event: Grown) -> list[bytes]:
        block = event.block
        if block.kind == "text":
            scores = self._scores(event.logprobs)
            return [self._event("response.output_text.delta", **self._at(block), delta=event.text, logprobs=scores)]
        if block.kind == "reasoning":
            return [self._event("response.reasoning_text.delta", **self._at(block), delta=event.text)]
        return [self._event("response.function_call_arguments.delta", **self._at(block), delta=event.text)]

    def _closed(self, block: Block) -> list[bytes]:
        item = self._item(block, "completed")
        self._items.append(item)
        at, text = self._at(block), block.text
        if block.kind == "call":
            kind = "response.function_call_arguments.done"
            out = [self._event(kind, **at, name=block.name, arguments=text)]
        elif block.kind == "reasoning":
            out = [
                self._event("response.reasoning_text.done", **at, text=text),
                self._event("response.content_part.done", **at, part=item["content"][0]),
            ]
        else:
            part = item["content"][0]
            out = [
                self._event("response.output_text.done", **at, text=text, logprobs=part["logprobs"]),
                self._event("response.content_part.done", **at, part=part),
            ]
        return [*out, self._event("response.output_item.done", output_index=block.place, item=item)]

    def _finish(self, usage: Usage) -> None:
        assert self._end is not None
        body = self._body
        cut_off = self._end.reason == "length"
        if cut_off and self._items:
            self._items[-1]["status"] = "incomplete"
        body["status"] = "incomplete" if cut_off else "completed"
        body["incomplete_details"] = {"reason": "max_output_tokens"} if cut_off else None
        body["completed_at"] = None if cut_off else int(time.time())
        body["output"] = self._items
        body["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }
        self._keep(body)

    def _failed(self, failure: ApiError) -> bytes:
        self._body |= {
            "status": "failed",
            "error": {"code": "server_error", "message": failure.message},
            "output": self._items,
        }
        return self._event("response.failed", response=self._body)

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        return item_of(block, self._names[block.place], status, self._scores(block.logprobs))

    def _scores(self, logprobs: list[Any]) -> list[Any]:
        if self._tokenizer is None or not logprobs:
            return []
        found = chat_logprobs(logprobs, self._body["top_logprobs"], self._tokenizer)["content"]
        return list(found)

    def _at(self, block: Block) -> dict[str, Any]:
        """Where an event belongs."""
        prefix = {"call": "fc", "reasoning": "rs", "text": "msg"}[block.kind]
        at = {"item_id": f"{prefix}_{self._names[block.place]}", "output_index": block.place}
        return at if block.kind == "call" else at | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._count = self._count, self._count + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)
