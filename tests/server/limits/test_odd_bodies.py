"""Bodies that Python can read and nothing else can: each is answered, whichever API it came through, and nobody who
asked in the same moment is harmed."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_harness import Served, listening, raw, with_app

pytestmark = pytest.mark.xdist_group("server")
HELLO: Any = [{"role": "user", "content": "Hello"}]
HUGE = 10**30
#: Ends at once: the model's end token is the likeliest.
SHORT: Any = {"model": "tiny", "prompt": "ab", "logit_bias": {"256": 100}, "temperature": 0}


@pytest.fixture
def server(tiny: Served) -> Iterator[Served]:
    yield tiny
    tiny.wait_idle()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", SHORT | {"max_tokens": HUGE, "top_k": HUGE}),
        ("/v1/chat/completions", {"messages": HELLO, "logit_bias": {"256": 100}, "max_completion_tokens": HUGE}),
        ("/v1/responses", {"input": "a", "max_output_tokens": HUGE}),
        ("/v1/messages", {"model": "tiny", "messages": HELLO, "max_tokens": HUGE, "top_k": HUGE}),
        ("/api/generate", {"model": "tiny", "prompt": "a", "options": {"num_predict": HUGE, "top_k": HUGE}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_beyond_64_bits_is_served_and_harms_nobody(server: Served, path: str, body: Any) -> None:
    """Both requests go to the engine in one message."""

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        plain = SHORT | {"max_tokens": 3}
        both = (client.post(path, json=body), client.post("/v1/completions", json=plain))
        return await asyncio.wait_for(asyncio.gather(*both), 60)

    assert [answer.status_code for answer in with_app(server, ask)] == [200, 200]


def test_a_least_length_beyond_the_context_is_the_context(server: Served) -> None:
    prompt = "x" * (server.client.info.max_model_len - 4)
    body = SHORT | {"prompt": prompt, "max_tokens": HUGE, "min_tokens": HUGE}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 4 and answer["choices"][0]["finish_reason"] == "length"


TOOL_NAN = '[{"type": "function", "name": "f", "parameters": {"x": NaN}}]'
CALLED = [*HELLO, {"role": "assistant", "tool_calls": 5}]
ODD = [
    ("/v1/completions", '{"prompt": "a", "logit_bias": {"\\u00b2": 1}}'),
    ("/v1/completions", '{"prompt": "a", "logit_bias": {"%s": 1}}' % ("9" * 5000)),
    ("/v1/completions", '{"prompt": "a", "cache_salt": "\\ud800"}'),
    ("/v1/completions", '{"prompt": "a", "structured_outputs": {"choice": [["a"]]}}'),
    ("/v1/completions", '{"prompt": "a", "bad_words": ["\\udfff"]}'),
    ("/v1/completions", '{"prompt": "a", "user": "\\ud800"}'.encode("utf-16")),
    ("/v1/chat/completions", json.dumps({"messages": HELLO, "response_format": {"type": "json_object", "schema": 5}})),
    ("/v1/responses", '{"input": "a", "metadata": {"a": "\\uDbff"}}'),
    ("/v1/responses", '{"input": "a", "user": "\\ud800", "stream": true}'),
    ("/v1/responses", '{"input": "a", "reasoning": {"effort": "low", "x": 1e999}}'),
    ("/v1/responses", '{"input": "a", "reasoning": {"effort": "low", "x": %s.5}}' % ("9" * 400)),
    ("/v1/responses", f'{{"input": "a", "tools": {TOOL_NAN}}}'),
    ("/v1/messages", json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 3, "output_format": "x"})),
    ("/v1/messages", json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 3, "output_config": {"format": 5}})),
    ("/api/chat", json.dumps({"model": "tiny", "messages": CALLED})),
    ("/api/chat", json.dumps({"model": "tiny", "messages": HELLO, "options": {"temperature": 10**400}})),
    ("/api/chat", json.dumps({"model": "tiny", "messages": HELLO, "options": {"stop": [1]}})),
    ("/api/chat", json.dumps({"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 21})),
    ("/api/generate", json.dumps({"model": "tiny", "prompt": "a", "raw": True, "format": {"type": "strin"}})),
    ("/api/embed", json.dumps({"model": "tiny", "input": [5]})),
    ("/api/embed", json.dumps({"model": "tiny", "input": "a", "dimensions": 10**30})),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), ODD, ids=lambda value: value[:60] if isinstance(value, str) else "utf-16")
def test_what_cannot_be_is_a_400_in_the_apis_own_form(server: Served, path: str, body: str | bytes) -> None:
    answer = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error if path.startswith("/api/") else error["message"]


def test_a_request_refused_by_the_engines_client_has_a_status_also_when_streamed(server: Served) -> None:
    for path, text in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": HELLO})):
        for wrong in ({"priority": 5}, {"kv_transfer_params": {"num_tokens": 0}}):
            body = text | wrong | {"stream": True}
            assert httpx.post(f"{server.url}/v1/{path}", json=body).status_code == 400, wrong


def test_options_that_leave_no_token_are_the_requests_fault(server: Served) -> None:
    choice = {"structured_outputs": {"choice": ["a"]}, "allowed_token_ids": [98], "max_tokens": 2}
    for path, text in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": HELLO})):
        answer = httpx.post(f"{server.url}/v1/{path}", json=text | choice, timeout=30)
        assert answer.status_code == 400 and "no token to choose" in answer.json()["error"]["message"]
        streamed = httpx.post(f"{server.url}/v1/{path}", json=text | choice | {"stream": True}, timeout=30).text
        assert '"type":"invalid_request_error"' in streamed and streamed.endswith("data: [DONE]\n\n")


def test_a_message_that_cannot_be_written_takes_no_other_along(server: Served) -> None:
    async def work() -> None:
        child = server.client._lives.child
        assert child is not None
        from dougong.errors import InvalidRequestError
        from dougong.server.process.messages import Finish

        asked = asyncio.ensure_future(server.client.stats())
        with pytest.raises(InvalidRequestError, match="cannot be handed to the engine"):
            child.say(Finish(1 << 70, ""))
        with pytest.raises(InvalidRequestError, match="cannot be handed to the engine"):
            child.say(Finish(0, "\ud800"))
        assert (await asyncio.wait_for(asked, 30)).num_running == 0

    server.run(work)


def test_a_burst_does_not_overrun_the_queue(server: Served) -> None:
    """Prompts are tokenised beside the event loop: what is being read there counts as well."""

    async def ask(client: httpx.AsyncClient) -> None:
        body: Any = {"max_tokens": 400, "ignore_eos": True}
        chat, plain = body | {"messages": HELLO}, body | {"prompt": "a"}
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=chat) for _ in range(20)),
            *(client.post("/v1/completions", json=plain) for _ in range(20)),
            *(client.post("/v1/embeddings", json={"input": ["a", "b"]}) for _ in range(5)),
        )
        status = [answer.status_code for answer in answers]
        assert sorted(set(status)) == [200, 429]
        assert status.count(200) <= 16

    with_app(server, ask, max_queue=0)


def test_curl_need_not_say_that_it_sends_json(server: Served) -> None:
    """As Ollama's own examples are written: curl -d says that it is a form."""
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": False, "options": {"num_predict": 2}}).encode()
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        assert httpx.post(f"{server.url}/api/chat", content=body, headers=headers).status_code == 200, headers
        page = httpx.post(f"{server.url}/api/chat", content=body, headers=headers | {"origin": "http://evil.example"})
        assert page.status_code == 415 and "application/json" in page.json()["error"], "asked by a page without leave"
    assert httpx.post(f"{server.url}/api/chat", content=b"\xef\xbb\xbf" + body).status_code == 200  # a BOM
    form = httpx.post(f"{server.url}/v1/completions", files={"prompt": b"a"})
    assert form.status_code == 415 and "multipart" in form.json()["error"]["message"]
    packed = {"content-encoding": "gzip", "content-type": "application/json"}
    refused = httpx.post(f"{server.url}/v1/completions", content=gzip.compress(body), headers=packed)
    assert refused.status_code == 415 and "gzip" in refused.json()["error"]["message"]


def test_head_is_get_without_the_body(server: Served) -> None:
    for path in ("/", "/health", "/v1/models"):
        answer, whole = httpx.head(server.url + path), httpx.get(server.url + path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert answer.headers["content-length"] == str(len(whole.content))
    assert httpx.head(f"{server.url}/nothing").status_code == 404
    assert httpx.head(f"{server.url}/web/live", timeout=5).status_code == 405  # it would never end
    with listening(server, api_key=("k",)) as (port, _):
        assert httpx.head(f"http://127.0.0.1:{port}/v1/models").status_code == 401


def test_two_requests_in_one_packet_and_a_body_in_pieces(server: Served) -> None:
    body = json.dumps(SHORT | {"max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    one = head + b"content-length: %d\r\n\r\n" % len(body) + body
    last = head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    last += b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert raw(server.port, one + one + last, timeout=30).count(b"HTTP/1.1 200") == 3
    with socket.create_connection(("127.0.0.1", server.port)) as rude:  # and one that goes away between two
        rude.sendall(one + one[:50])
