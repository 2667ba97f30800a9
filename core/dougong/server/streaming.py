"""Answers over HTTP: server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dougong.server.errors import ApiError

__all__ = ["DONE", "EventStream", "first_then", "sse", "until_gone"]

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode

#: The end of a stream in OpenAI's API.
DONE = b"data: [DONE]\n\n"


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event with ``data`` as JSON."""
    head = b"" if event is None else b"event: %s\n" % event.encode()
    return b"%sdata: %s\n\n" % (head, _encode(data))


class EventStream(StreamingResponse):
    """A stream of chunks. When the client goes away, also one that reads slowly, ``chunks`` is closed at once."""

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # A proxy that buffered the stream would show the answer all at once.
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"} | dict(headers or {})
        super().__init__(chunks, media_type=media_type, headers=own)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette's own notices a client that went away only when it next sends something, under newer servers.
        pump = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                with contextlib.suppress(OSError):  # it went away while something was sent
                    pump.result()
        finally:
            await _cancel(pump, gone)

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def first_then(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """``items`` once its first one is there: what it raises before that is raised here, before any header is sent."""
    first = await anext(items)

    async def rest() -> AsyncGenerator[T, None]:
        async with aclosing(items):
            yield first
            async for item in items:
                yield item

    return rest()


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; it is cancelled if the client goes away first.

    The request's body must have been read.

    Raises:
        ApiError: 499, which nobody sees.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client went away")
    finally:
        await _cancel(task, gone)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel those that are not done, and wait until they are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
