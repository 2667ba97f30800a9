"""What is held open: heads that do not come in, answers that nobody takes, and who may connect at all. Real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import Served, listening, raw

pytestmark = pytest.mark.xdist_group("server")
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
#: 400 tokens with 20 log-probabilities each: some 500 KB, more than the sockets of these tests hold.
LARGE: Any = {"prompt": "ab", "max_tokens": 400, "ignore_eos": True, "logprobs": 20}


@pytest.fixture
def server(tiny: Served) -> Iterator[Served]:
    yield tiny
    tiny.wait_idle()


def until_closed(connection: socket.socket, seconds: float = 20) -> bytes:
    connection.settimeout(seconds)
    found = b""
    while chunk := connection.recv(65536):
        found += chunk
    return found


def ask(port: int, body: Any, *, close: bool = False) -> socket.socket:
    """A request from a client that takes 2 KiB and no more."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    extra = b"connection: close\r\n" if close else b""
    connection.sendall(HEAD + extra + b"content-length: %d\r\n\r\n" % len(data) + data)
    return connection


def trickle(connection: socket.socket) -> None:
    """A byte now and then, until the server has closed."""
    for _ in range(200):
        connection.sendall(b"a")
        time.sleep(0.05)


def test_a_head_that_does_not_come_in_is_answered_408_and_the_socket_closed(server: Served) -> None:
    with listening(server, head_timeout_s=0.3) as (port, _):
        assert b" 408 " in raw(port, HEAD).split(b"\r\n")[0]
        with socket.create_connection(("127.0.0.1", port)) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            kept.settimeout(10)
            first = b""
            while not first.endswith(b"}"):
                first += kept.recv(65536)
            kept.sendall(b"GET /hea")
            answer = until_closed(kept)
        assert first.startswith(b"HTTP/1.1 200")
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert "within 0.3 s" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert raw(port, b"") == b""  # a connection on which nothing is said
        slow = socket.create_connection(("127.0.0.1", port))  # a byte now and then helps nobody
        slow.sendall(b"GET /health HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            trickle(slow)
        slow.close()


def test_a_head_without_end_is_refused(server: Served) -> None:
    with listening(server) as (port, _):
        answer = raw(port, HEAD + b"x: " + b"a" * 66_000)
        assert answer[:13] in (b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")  # ours, or h11's own bound


def test_a_body_that_follows_its_answer_without_end_is_not_waited_for(server: Served) -> None:
    """The answer (401, 404 …) is out, the connection is kept, and the body trickles on."""
    with listening(server, head_timeout_s=0.3) as (port, _), socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n")
        slow.settimeout(10)
        assert slow.recv(65536).startswith(b"HTTP/1.1 404")
        with pytest.raises(ConnectionError):
            trickle(slow)


@pytest.mark.parametrize(
    ("body", "close"),
    [
        (LARGE | {"max_tokens": 150}, False),
        pytest.param(LARGE, True, marks=pytest.mark.prove),
        pytest.param(LARGE | {"stream": True}, False, marks=pytest.mark.prove),
        pytest.param(LARGE | {"stream": True}, True, marks=pytest.mark.prove),
    ],
    ids=["whole, kept", "whole, closed", "stream, kept", "stream, closed"],
)
def test_who_never_reads_is_cut_off(server: Served, body: Any, close: bool) -> None:
    with listening(server, write_timeout_s=0.3, small=True) as (port, http):
        client = ask(port, body, close=close)
        end = time.monotonic() + 20
        while not http.server_state.connections:
            assert time.monotonic() < end
            time.sleep(0.01)
        while http.server_state.connections:
            assert time.monotonic() < end, "the socket is still held"
            time.sleep(0.05)
        with contextlib.suppress(ConnectionError):
            assert len(until_closed(client)) < 100_000, "it was taken after all"
        client.close()


@pytest.mark.prove
def test_who_reads_slowly_gets_the_whole_answer(server: Served) -> None:
    with listening(server, write_timeout_s=1.5, small=True, keep_alive_s=1) as (port, _):
        client = ask(port, LARGE)
        client.settimeout(10)
        answer = b""
        begun = time.monotonic()
        while time.monotonic() - begun < 3:  # twice the limit
            answer += client.recv(1024)
            time.sleep(0.02)
        answer += until_closed(client)
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["logprobs"]["tokens"]) == 400
        client.close()


def test_a_unix_socket_and_a_path_below_a_proxy(server: Served, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    options: Any = {"uds": path, "root_path": "/llm", "api_key": ("k",), "rate_limit_requests": 100}
    with listening(server, **options), httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
        for prefix in ("", "/llm"):  # a proxy may leave its prefix in
            assert client.get(f"http://x{prefix}/health").status_code == 200
            body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
            assert client.post(f"http://x{prefix}/v1/messages", json=body).json()["type"] == "error"  # Anthropic's form
            assert client.post(f"http://x{prefix}/v1/messages", json=body, headers={"x-api-key": "k"}).is_success


def make_certificates(folder: Path) -> dict[str, str]:
    """A server's certificate, an authority, a client's certificate from it, and one from nobody."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("server", "authority", "stranger"):
        openssl("req", "-x509", *key, "-days", "1", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj",
                f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip
    openssl("req", *key, "-keyout", "client.key", "-out", "client.csr", "-subj", "/CN=client")
    openssl("x509", "-req", "-in", "client.csr", "-CA", "authority.pem", "-CAkey", "authority.key", "-days", "1",
            "-set_serial", "7", "-out", "client.pem")  # fmt: skip
    return {path.name: str(path) for path in folder.iterdir()}


def test_tls_and_certificates_of_clients(server: Served, tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    options: Any = {"tls_cert": files["server.pem"], "tls_key": files["server.key"]}

    def get(port: int, own: str | None, scheme: str = "https") -> int:
        trusted = ssl.create_default_context(cafile=files["server.pem"])
        if own is not None:
            trusted.load_cert_chain(files[f"{own}.pem"], files[f"{own}.key"])
        return httpx.get(f"{scheme}://127.0.0.1:{port}/health", verify=trusted).status_code

    with listening(server, **options) as (port, _):
        assert get(port, None) == 200
        with pytest.raises(httpx.HTTPError):
            get(port, None, "http")
    with listening(server, **options, tls_client_ca=files["authority.pem"]) as (port, _):
        assert get(port, "client") == 200
        for other in (None, "stranger"):
            with pytest.raises(httpx.HTTPError):
                get(port, other)
