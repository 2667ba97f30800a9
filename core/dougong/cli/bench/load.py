"""Sending many streaming requests at once and noting when each piece comes. One event loop, HTTP/1.1, nothing more:
the client shares the machine with what it measures."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from dougong.cli.bench.workload import Arrivals, Prompt

__all__ = ["Answer", "Target", "run_load"]

#: Fields of a chat's delta that are part of the answer.
_PIECES = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass
class Answer:
    """What came of one request. Times in seconds on ``perf_counter``'s clock."""

    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    """When each chunk with text came."""
    done: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time per token after the first."""
        if self.output_tokens < 2 or len(self.pieces) < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:])]

    @property
    def e2e(self) -> float:
        return self.done - self.sent


@dataclass(frozen=True)
class Target:
    """Where requests go. ``endpoint``: ``completions`` or ``chat``; ``extra`` goes into each body."""

    url: str
    model: str
    endpoint: str = "completions"
    api_key: str | None = None
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0

    def request(self, prompt: Prompt) -> tuple[str, bytes]:
        """Path and body."""
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": prompt.output_len, "temperature": 0.0,
            "stream": True, "stream_options": {"include_usage": True}, **self.extra,
        }  # fmt: skip
        if self.ignore_eos:
            body["ignore_eos"] = True
        path = urlsplit(self.url).path
        if self.endpoint == "chat":
            content = prompt.content
            is_messages = isinstance(content, list) and content and isinstance(content[0], dict)
            body["messages"] = content if is_messages else [{"role": "user", "content": content}]
            return f"{path}/chat/completions", json.dumps(body).encode()
        body["prompt"] = prompt.content
        return f"{path}/completions", json.dumps(body).encode()


async def run_load(
    target: Target,
    prompts: list[Prompt],
    arrivals: Arrivals,
    *,
    max_concurrency: int | None = None,
    seed: int = 0,
    on_done: Callable[[Answer], None] = lambda answer: None,
) -> tuple[list[Answer], float]:
    """Send all; answers in the prompts' order, and the seconds from the first request to the last answer."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    started = perf_counter()

    async def one(prompt: Prompt, at: float) -> Answer:
        delay = started + at - perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        if gate is None:
            answer = await _ask(target, prompt)
        else:
            async with gate:
                answer = await _ask(target, prompt)
        on_done(answer)
        return answer

    tasks = [asyncio.create_task(one(prompt, at)) for prompt, at in zip(prompts, arrivals.times(len(prompts), seed))]
    answers = await asyncio.gather(*tasks)
    return answers, perf_counter() - started


async def _ask(target: Target, prompt: Prompt) -> Answer:
    answer = Answer()
    try:
        await asyncio.wait_for(_stream(target, prompt, answer), target.timeout_s)
    except asyncio.TimeoutError:
        answer.error = f"no end within {target.timeout_s:g} s"
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.done = perf_counter()
    if not answer.error and not answer.pieces:
        answer.error = "the answer was empty"
    if not answer.output_tokens:
        answer.output_tokens = len(answer.pieces)  # a server that sends no usage: a piece is a token, mostly
    return answer


async def _stream(target: Target, prompt: Prompt, answer: Answer) -> None:
    parts = urlsplit(target.url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    path, body = target.request(prompt)
    head = [
        f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json", "Accept: text/event-stream",
        f"Content-Length: {len(body)}", "Connection: close",
    ]  # fmt: skip
    if target.api_key:
        head.append(f"Authorization: Bearer {target.api_key}")
    answer.sent = perf_counter()
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=1 << 20)
    try:
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        status, headers = await _head(reader)
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        content = _chunks(reader) if chunked else _plain(reader)
        if status != 200:
            text = b"".join([part async for part in content])
            answer.error = f"{status}: {text.decode(errors='replace')[:300]}"
            return
        await _events(content, answer)
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if not size:
            return
        yield data[:-2]


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 16):
        yield data


async def _events(content: AsyncIterator[bytes], answer: Answer) -> None:
    rest = b""
    ended = False
    async for data in content:
        now = perf_counter()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            event = event.strip()
            if not event.startswith(b"data:"):
                continue
            text = event[5:].strip()
            if text == b"[DONE]":
                ended = True
            else:
                _note(json.loads(text), now, answer)
    if not ended and not answer.error:
        answer.error = "the connection closed before [DONE]"


def _note(chunk: dict[str, Any], now: float, answer: Answer) -> None:
    if "error" in chunk:
        answer.error = str(chunk["error"])
        return
    usage = chunk.get("usage")
    if usage:
        answer.prompt_tokens = usage.get("prompt_tokens", 0)
        answer.output_tokens = usage.get("completion_tokens", 0)
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or any(delta.get(name) for name in _PIECES):
            answer.pieces.append(now)
