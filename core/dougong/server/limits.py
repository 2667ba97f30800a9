"""How much a client may ask for: requests and tokens per minute, and room in the queue."""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from dougong.server.errors import ApiError
from dougong.server.keys import Key
from dougong.server.process.client import EngineClient
from dougong.server.process.observer import RequestObserver, RequestStart
from dougong.types import RequestOutput

__all__ = ["Allowance", "QueueLimit", "RateLimits", "current_allowance"]

#: Clients without a key whose use is remembered.
_MOST_CLIENTS = 10_000
#: Requests whose end says how fast the queue moves.
_ENDS = 64


class Bucket:
    """``rate`` per minute, all of which may be used at once. It may go below 0: what came too much is waited for."""

    __slots__ = ("_at", "left", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.left = float(rate)
        self._at = time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        self.left = min(float(self.rate), self.left + (now - self._at) * self.rate / 60)
        self._at = now

    def wait_s(self, amount: float) -> float:
        """Seconds until ``amount`` can be taken; 0: now."""
        self.refill()
        return max(0.0, (amount - self.left) * 60 / self.rate)


@dataclass
class Allowance:
    """What one client may still use; None: as much as it likes."""

    requests: Bucket | None
    tokens: Bucket | None

    def take_request(self) -> dict[str, str]:
        """Count a request; returns headers that say what is left, under the names OpenAI's clients know.

        Raises:
            ApiError: 429, with Retry-After.
        """
        headers: dict[str, str] = {}
        wait = 0.0
        for bucket, word, amount in ((self.requests, "requests", 1.0), (self.tokens, "tokens", 1.0)):
            if bucket is None:
                continue
            due = bucket.wait_s(amount)
            if due > wait:
                wait = due
            headers[f"x-ratelimit-limit-{word}"] = str(bucket.rate)
            headers[f"x-ratelimit-remaining-{word}"] = str(max(0, math.floor(bucket.left - (word == "requests"))))
            headers[f"x-ratelimit-reset-{word}"] = f"{bucket.wait_s(bucket.rate):.2f}s"
        if wait > 0:
            raise ApiError(
                429,
                f"rate limit reached: try again in {wait:.1f} s.",
                code="rate_limit_exceeded",
                headers={**headers, "retry-after": str(math.ceil(wait))},
            )
        if self.requests is not None:
            self.requests.left -= 1
        return headers


#: The allowance of the client whose request is being served.
current_allowance: ContextVar[Allowance | None] = ContextVar("dougong_allowance", default=None)


class RateLimits(RequestObserver):
    """Allowances by key or address, and the observer that charges them for tokens."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._requests = requests_per_minute
        self._tokens = tokens_per_minute
        self._clients: OrderedDict[str, tuple[int | None, int | None, Allowance]] = OrderedDict()
        self._running: dict[str, Allowance] = {}

    def of(self, key: Key | None, address: str) -> Allowance | None:
        """The allowance of a key, or of an address where there is none; None: no limits."""
        requests = key.requests_per_minute if key is not None and key.requests_per_minute else self._requests
        tokens = key.tokens_per_minute if key is not None and key.tokens_per_minute else self._tokens
        if requests is None and tokens is None:
            return None
        name = f"key {key.name}" if key is not None else f"address {address}"
        known = self._clients.get(name)
        if known is None or known[:2] != (requests, tokens):
            allowance = Allowance(Bucket(requests) if requests else None, Bucket(tokens) if tokens else None)
            known = self._clients[name] = (requests, tokens, allowance)
            if len(self._clients) > _MOST_CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(name)
        return known[2]

    def started(self, request: RequestStart) -> None:
        allowance = current_allowance.get()
        if allowance is not None and allowance.tokens is not None:
            self._running[request.request_id] = allowance

    def finished(self, output: RequestOutput) -> None:
        allowance = self._running.pop(output.request_id, None)
        if allowance is not None and allowance.tokens is not None:
            allowance.tokens.refill()
            allowance.tokens.left -= len(output.prompt_token_ids) + sum(len(o.token_ids) for o in output.outputs)


class QueueLimit(RequestObserver):
    """Room for completions: those that the engine runs, and ``max_queue`` that wait.

    As an observer it sees how fast requests end, and so when there will be room again.
    """

    def __init__(self, client: EngineClient, max_queue: int) -> None:
        self._client = client
        self._max_queue = max_queue
        self._ended: deque[tuple[float, int]] = deque(maxlen=_ENDS)
        self._arriving = 0
        """Completions whose prompts are being read: the client does not count them yet."""

    def finished(self, output: RequestOutput) -> None:
        self._ended.append((time.monotonic(), len(output.outputs)))

    def _wait_s(self, count: int) -> float:
        """About how long until ``count`` more completions have ended; as fast as the last ones did."""
        if len(self._ended) < 2:
            return 1.0
        took = time.monotonic() - self._ended[0][0]
        return count * took / sum(ended for _, ended in self._ended)

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Room for ``count`` more, kept for them until they are read and the engine is there to be asked.

        Raises:
            ApiError: 429 with Retry-After: the queue is full; 400: they would never fit.
        """
        self._check(count)
        self._arriving += count
        try:
            yield
        finally:
            self._arriving -= count

    def _check(self, count: int) -> None:
        room = self._client.info.max_num_seqs + self._max_queue
        if count > room:
            raise ApiError(400, f"the request asks for {count} completions; the queue holds {room}. Ask for fewer.")
        held = self._client.num_completions + self._arriving
        if held + count > room:
            raise ApiError(
                429,
                f"the server is full: {held} completions run or wait, and {room} is the limit. Try again soon.",
                code="queue_full",
                headers={"retry-after": str(max(1, min(60, math.ceil(self._wait_s(held + count - room)))))},
            )
