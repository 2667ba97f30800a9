"""Answers over HTTP, counted by route and status."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Served
from starlette.routing import Route

from dougong.server.http_metrics import HttpCounts, HttpMetrics

pytestmark = pytest.mark.xdist_group("server")


def counted(server: Served) -> dict[tuple[str, str, str], float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.labels["method"], sample.labels["handler"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "http_requests_total"
    }


def test_answers_count_under_their_route_and_status(tiny: Served) -> None:
    before = counted(tiny)
    post: Any = {"prompt": "a", "max_tokens": 1}
    for path in ("/v1/completions", "/v1/chat/completions"):
        httpx.post(tiny.url + path, json=post | {"temperature": -1})
    httpx.post(f"{tiny.url}/v1/completions", json=post)
    httpx.post(f"{tiny.url}/v1/completions", json=post | {"stream": True})
    httpx.post(f"{tiny.url}/v1/completions", content=b"x" * 30_000)  # refused before there is a route
    for name in ("tiny", "other", "a/b"):
        httpx.get(f"{tiny.url}/v1/models/{name}")
    for path in ("/nothing", "/secret-1", "/secret-2"):
        httpx.get(tiny.url + path)
    httpx.request("BREW", f"{tiny.url}/health")
    after = counted(tiny)
    grown = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    assert grown.pop(("GET", "/metrics", "200")) == 1
    assert grown == {
        ("POST", "/v1/completions", "200"): 2,
        ("POST", "/v1/completions", "400"): 1,
        ("POST", "/v1/chat/completions", "400"): 1,
        ("POST", "/v1/completions", "413"): 1,
        ("GET", "/v1/models/{model}", "200"): 1,
        ("GET", "/v1/models/{model}", "404"): 2,
        ("GET", "none", "404"): 3,  # what clients make up becomes no label
        ("none", "/health", "405"): 1,
    }


def test_a_stream_lasts_until_its_end_and_who_goes_away_first_is_499() -> None:
    counts = HttpCounts()
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/broken":
            raise RuntimeError
        if scope["path"] == "/gone":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await gate.wait()

    async def work() -> None:
        counting = HttpMetrics(app, counts, [Route(f"/{name}", app) for name in ("slow", "gone", "broken")])

        async def nothing(*_: Any) -> None:
            return None

        def ask(path: str) -> Any:
            return counting({"type": "http", "method": "GET", "path": path}, nothing, nothing)

        slow = asyncio.ensure_future(ask("/slow"))
        await ask("/gone")
        with pytest.raises(RuntimeError):
            await ask("/broken")
        assert counts.answers == {("GET", "/gone", 499): 1, ("GET", "/broken", 500): 1}
        await asyncio.sleep(0.02)
        gate.set()
        await slow

    asyncio.run(work())
    assert counts.answers["GET", "/slow", 200] == 1
    assert counts.seconds["GET", "/slow"].sum >= 0.02
    assert counts.seconds["GET", "/slow"].count == 1
