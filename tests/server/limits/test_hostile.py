"""Clients that mean harm or are broken: each gets a clear answer, nobody else notices, every KV block comes back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import Served, raw, with_app

from dougong.server.keys import KeyFile

HELLO: Any = [{"role": "user", "content": "Hello"}]
pytestmark = pytest.mark.xdist_group("server")
LONG: Any = {"model": "tiny", "prompt": "ab", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(tiny: Served) -> Iterator[Served]:
    """After each test every request is over and every KV block is back."""
    yield tiny
    tiny.wait_idle()


def post(server: Served, body: bytes, path: str = "/v1/completions", kind: str = "application/json") -> httpx.Response:
    return httpx.post(server.url + path, content=body, headers={"content-type": kind})


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b'{"prompt": "a",}',
    b'{"prompt": "\xff\xfe"}',
    b"\xff\xfe\x00",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "max_tokens": 1.5}',
    b'{"prompt": "a", "seed": 123456789012345678901234567890}',
    b'{"prompt": "a", "n": -1}',
    b'{"prompt": "a", "logit_bias": {"x": 1}}',
    b'{"prompt": "a", "logit_bias": {"1": 1e300}}',
    b'{"prompt": "a", "stop": ' + json.dumps(["x"] * 65).encode() + b"}",
    b'{"prompt": "a", "stop": "' + b"x" * 2000 + b'"}',
    b'{"prompt": [[1], "a"]}',
    b'{"prompt": [-1]}',
    b'{"prompt": [1e99]}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "a", "x": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    b'{"prompt": "a", "priority": 1e400}',
    b'{"prompt": "a", "model": 5}',
    b'{"prompt": "a", "stream": "maybe"}',
    b'{"prompt": "a", "allowed_token_ids": []}',
    b'{"prompt": "a", "request_id": ""}',
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:40].decode("latin-1"))
def test_a_body_that_cannot_be_served_is_a_400_that_says_why(server: Served, body: bytes) -> None:
    answer = post(server, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_paths_and_methods_that_do_not_exist_are_told_in_the_apis_form(server: Served) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.delete(f"{server.url}/v1/completions").status_code == 405
    assert httpx.post(f"{server.url}/v1/messages/none", json={}).json()["type"] == "error"


def test_a_body_too_large_or_never_sent_whole_is_refused(server: Served) -> None:
    assert post(server, b'{"prompt": "' + b"x" * 30_000 + b'"}').status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    assert httpx.post(f"{server.url}/v1/completions", content=endless()).status_code == 413
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
    assert b" 408 " in raw(server.port, head + b'{"prompt": ', timeout=5).split(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", server.port)) as half:  # and one that goes away in the middle
        half.sendall(head + b"{")
    assert post(server, b'{"prompt": "a", "max_tokens": 1}').status_code == 200


def open_stream(server: Served, body: Any, small: bool = False) -> socket.socket:
    data = json.dumps(body).encode()
    connection = socket.socket()
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % len(data)
        + data
    )
    return connection


def test_clients_that_leave_in_mid_stream_or_before_an_answer_free_their_blocks(server: Served) -> None:
    streams = [open_stream(server, LONG | {"n": 1 + i % 3}) for i in range(8)]
    for stream in streams:
        assert stream.recv(20).startswith(b"HTTP/1.1 200")
    waiting = [open_stream(server, LONG | {"stream": False, "n": 2}) for _ in range(4)]
    for one in streams + waiting:
        one.close()
    server.wait_idle()


def test_a_reader_that_never_reads_holds_up_nobody(server: Served) -> None:
    slow = [open_stream(server, LONG, small=True) for _ in range(4)]
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 5}, timeout=30)
    assert answer.status_code == 200
    server.wait_idle()  # the engine is done with them although nobody reads
    for one in slow:
        one.close()


def test_without_a_key_only_health_and_the_like_answer(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = KeyFile(path).add("alice")

    async def ask(client: httpx.AsyncClient) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}, {"x-api-key": "wrong"}):
            refused = await client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        for headers in ({"authorization": f"Bearer {secret}"}, {"x-api-key": secret}, {"x-api-key": "fixed"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for open_path in ("/health", "/version", "/openapi.json"):
            assert (await client.get(open_path)).status_code == 200
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 401

    with_app(server, ask, api_key=("fixed",), api_keys_file=str(path))


def test_rate_limits_answer_429_with_the_time_to_wait(server: Served) -> None:
    body = {"prompt": "ab", "max_tokens": 8, "ignore_eos": True}

    async def requests(client: httpx.AsyncClient) -> None:
        first = await client.post("/v1/completions", json=body)
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        await client.post("/v1/completions", json=body)
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await client.get("/v1/models")).status_code == 200

    with_app(server, requests, rate_limit_requests=2)

    async def tokens(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.post("/v1/completions", json=body)).status_code == 429

    with_app(server, tokens, rate_limit_tokens=10)


def test_a_full_queue_answers_429_and_takes_requests_again_after(server: Served) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        long = LONG | {"stream": False, "max_tokens": 200, "n": 16}
        running = asyncio.ensure_future(client.post("/v1/completions", json=long))
        while server.client.num_completions < 16:
            await asyncio.sleep(0.005)
        for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": HELLO})):
            refused = await client.post(f"/v1/{path}", json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        assert (await running).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "a", "n": 17})).status_code == 400

    with_app(server, ask, max_queue=0)


def test_a_request_ends_at_its_time_limit(server: Served) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        late = await client.post("/v1/completions", json=LONG | {"stream": False})
        assert late.status_code == 504
        assert "time limit" in late.json()["error"]["message"]
        stream = await client.post("/v1/completions", json=LONG)
        assert "time limit" in stream.text.split("\n\n")[-3]

    with_app(server, ask, request_timeout_s=0.05)

    async def embed(client: httpx.AsyncClient) -> None:
        late = await client.post("/v1/embeddings", json={"input": ["x" * 400] * 16})
        assert late.status_code == 504 and "time limit" in late.json()["error"]["message"]

    with_app(server, embed, request_timeout_s=0.0001)


def test_the_time_limit_counts_while_the_engine_is_being_started_again(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def ask(client: httpx.AsyncClient) -> None:
        for path, body in {
            "/v1/completions": {"prompt": "a"},
            "/v1/chat/completions": {"messages": HELLO, "stream": True},
            "/v1/embeddings": {"input": "a"},
            "/api/generate": {"model": "tiny", "prompt": "a", "raw": True},
        }.items():
            late = await asyncio.wait_for(client.post(path, json=body), 30)
            assert late.status_code == 504 and "started again" in late.text, path

    with monkeypatch.context() as patched:
        patched.setattr(server.client._lives, "ready", never)
        with_app(server, ask, request_timeout_s=0.05)


def test_pages_of_other_origins_may_call_only_where_they_are_named(server: Served) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        allowed = await client.options("/v1/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options("/v1/completions", headers=asked | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers

    with_app(server, ask, cors_origins=("https://a.example",), api_key=("k",))


def test_request_ids_come_back_and_cannot_be_used_to_write_headers(server: Served) -> None:
    assert httpx.get(f"{server.url}/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert httpx.get(f"{server.url}/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_no_prompt_and_no_answer_is_in_the_log(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "xyzzy-plugh"
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": secret, "max_tokens": 3, "temperature": 0})
    httpx.post(f"{server.url}/v1/completions", json={"prompt": secret, "temperature": -1})
    assert answer.status_code == 200
    assert secret not in caplog.text
