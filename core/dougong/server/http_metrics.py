"""What was asked over HTTP and how it was answered: counts by route and status, and how long answers took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from re import Pattern
from time import monotonic

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from starlette.routing import BaseRoute, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dougong.server.guard import path_of
from dougong.server.histogram import Histogram

__all__ = ["HttpCounts", "HttpMetrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
#: The label of paths that no route has, and of methods nobody knows: what clients make up must not become labels.
_NONE = "none"


class HttpCounts:
    """Counts since the server's start, under the names that vLLM's server has for them."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str, int], int] = {}
        """By method, route and status."""
        self.seconds: dict[tuple[str, str], Histogram] = {}
        """By method and route: from a request's head to the last byte given to its answer."""

    def add(self, method: str, handler: str, status: int, seconds: float) -> None:
        """An answer is over."""
        self.answers[method, handler, status] = self.answers.get((method, handler, status), 0) + 1
        histogram = self.seconds.get((method, handler))
        if histogram is None:
            histogram = self.seconds[method, handler] = Histogram(_SECONDS)
        histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily(
            "http_requests", "Answers over HTTP, by status.", labels=("method", "handler", "status")
        )
        for (method, handler, status), count in self.answers.items():
            answers.add_metric((method, handler, str(status)), count)
        yield answers
        seconds = HistogramMetricFamily(
            "http_request_duration_seconds", "From a request's head to its answer's end.", labels=("method", "handler")
        )
        for labels, histogram in self.seconds.items():
            seconds.add_metric(labels, buckets=histogram.buckets(), sum_value=histogram.sum)
        yield seconds


class HttpMetrics:
    """ASGI middleware that counts. It stands outermost, so that refusals count too.

    Args:
        routes: all there are; a request counts under its route's path, such as ``/v1/models/{model}``.
    """

    def __init__(self, app: ASGIApp, counts: HttpCounts, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._counts = counts
        self._plain: set[str] = set()
        self._patterns: list[tuple[Pattern[str], str]] = []
        for route in routes:
            path = getattr(route, "path", None)
            if path is None:
                continue
            pattern, shown, parameters = compile_path(path)
            if parameters:
                self._patterns.append((pattern, shown))
            else:
                self._plain.add(path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = monotonic()
        status = 499  # the client went away before there was an answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method, path = scope["method"], path_of(scope)
        try:
            await self._app(scope, receive, answer)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            known = method if method in _METHODS else _NONE
            self._counts.add(known, self._handler(path), status, monotonic() - begun)

    def _handler(self, path: str) -> str:
        if path in self._plain:
            return path
        return next((shown for pattern, shown in self._patterns if pattern.match(path)), _NONE)
