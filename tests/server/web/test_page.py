"""The page's files and frames, without a browser: what is sent, with which headers, and nothing from outside."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64decode
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Response

from dougong.server.errors import ApiError
from dougong.server.process.messages import BlockMap, EngineInfo, EngineSnapshot, KernelInfo, RequestState, StepTimes
from dougong.server.web import frames, routes

INFO = EngineInfo(
    version="0.1.0", pid=7, model_path="/m", model_type="llama", dtype="bfloat16", quantization=None, vocab_size=100,
    max_model_len=4096, capacity_tokens=None, eos_token_ids=[2], max_num_seqs=8, max_num_batched_tokens=2048,
    backend="cpu", device="a processor", hidden_size=64, usable_blocks=63, start_s=1.0,
    kernels=[KernelInfo("attention", "fast", "cpu", [("reference", "its priority is lower")])],
)  # fmt: skip


def request(request_id: str = "a", blocks: list[list[int]] | None = None, **values: Any) -> RequestState:
    given = {
        "status": "running", "prompt_tokens": 20, "cached_tokens": 0, "output_tokens": 3, "computed_tokens": 22,
        "max_tokens": 50, "priority": 0, "preemptions": 0, "age_s": 1.0, "running_s": 0.5, "first_token_s": 0.7,
    } | values  # fmt: skip
    return RequestState(request_id=request_id, blocks=[[]] if blocks is None else blocks, **given)


def snapshot(states: bytes, counts: bytes, running: list[RequestState], **values: Any) -> EngineSnapshot:
    given = {
        "time": 1e9, "uptime_s": 5.0, "pid": 7, "steps": 3, "waiting": [], "num_running": len(running),
        "num_waiting": 0, "kv_usage": 0.5, "prompt_tokens": 1, "cached_tokens": 1, "generated_tokens": 1,
        "computed_tokens": 1, "preemptions": 0, "prefix_queries": 1, "prefix_hits": 0, "evictions": 0, "finished": {},
        "tokens_per_s": 9.0, "cpu_s": 1.0, "recent_steps": [],
    } | values  # fmt: skip
    blocks = BlockMap(block_size=16, window=None, scratch_blocks=1, states=states, ref_counts=counts)
    return EngineSnapshot(running=running, blocks=[blocks], **given)


# -- frames --------------------------------------------------------------------------------------------------


def test_cells_show_free_cached_shared_and_whose_a_block_is() -> None:
    states = bytes([2, 0, 1, 2, 3, 3])
    counts = bytes([1, 0, 0, 1, 1, 2])
    frame = frames.snapshot_frame(snapshot(states, counts, [request("a", [[3, 5]])]))
    (group,) = frame["groups"]
    cells = list(b64decode(group["cells"]))
    colour = frame["running"][0]["colour"]
    assert cells == [3, 0, 1, 8 + colour, 4, 2]  # scratch, free, cached, a's own, held by one not listed, shared
    assert (group["blocks"], group["scratch"], group["held"], group["cached"], group["per_cell"]) == (6, 1, 3, 1, 1)
    assert frame["running"][0]["blocks"] == 2


def test_a_large_pool_is_shown_by_cells_of_several_blocks() -> None:
    count = 3 * frames.MOST_CELLS
    states = bytes([2] + [0] * (count // 2 - 1) + [1] * (count // 2))
    (group,) = frames.snapshot_frame(snapshot(states, bytes(count), []))["groups"]
    cells = b64decode(group["cells"])
    assert len(cells) == frames.MOST_CELLS and group["per_cell"] == 3
    assert cells[0] == 0 and cells[-1] == 1 and set(cells) == {0, 1}


def test_requests_have_the_same_colour_in_each_frame_and_no_text() -> None:
    one = frames.snapshot_frame(snapshot(b"\2", b"\1", [request("a"), request("b")]))
    two = frames.snapshot_frame(snapshot(b"\2", b"\1", [request("b")]))
    assert one["running"][1]["colour"] == two["running"][0]["colour"]
    assert all(0 <= one["running"][index]["colour"] < frames.COLOURS for index in (0, 1))
    assert not {"prompt", "text", "prompt_token_ids"} & set(one["running"][0])


def test_only_new_steps_and_not_too_many_requests() -> None:
    steps = [StepTimes(index, 4, 4, 0.001, 0.002, 0.003, 0.004, 0.01) for index in range(10)]
    running = [request(str(index)) for index in range(300)]
    frame = frames.snapshot_frame(snapshot(b"\2", b"\1", running, recent_steps=steps), after_step=7)
    assert [step[0] for step in frame["recent"]] == [8, 9]
    assert frame["recent"][0] == [8, 4, 4, 1.0, 2.0, 3.0, 4.0]
    assert len(frame["running"]) == frames.MOST_REQUESTS and frame["num_running"] == 300


# -- routes --------------------------------------------------------------------------------------------------


class Client:
    """Two snapshots, a restart, and one more."""

    info = INFO
    closed = False

    async def subscribe(self) -> AsyncIterator[EngineSnapshot]:
        try:
            for pid in (7, 7, 8):
                yield snapshot(b"\2", b"\1", [], pid=pid)
        finally:
            self.closed = True


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def app(client: Client) -> FastAPI:
    state = SimpleNamespace(client=client, config=SimpleNamespace(model_names=("tiny",)))
    app = FastAPI()
    app.include_router(routes.router(state))  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, lambda request, error: Response(status_code=error.status))  # type: ignore
    return app


def get(app: FastAPI, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request through the application's own interface."""
    sent: list[Any] = []

    async def call() -> None:
        async def receive() -> Any:
            await asyncio.sleep(0 if not sent else 3600)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": raw, "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("t", 1),
                 "server": ("t", 80), "asgi": {"version": "3.0"}}  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(call())
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(message.get("body", b"") for message in sent[1:])


def files() -> dict[str, str]:
    return {name: one.content.decode() for name, one in routes._load().items()}


def test_the_page_allows_nothing_from_elsewhere(app: FastAPI) -> None:
    status, headers, body = get(app, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    links = re.findall(rb'(?:src|href)="([^"#]+)"', body)
    assert len(links) >= 5
    for link in links:  # relative, so that a proxy may serve the page below a path
        assert get(app, f"/{link.decode()}")[0] == 200, link


def test_a_browser_that_has_it_is_told_so(app: FastAPI) -> None:
    _, headers, _ = get(app, "/web/main.js")
    assert headers["content-type"] == "text/javascript; charset=utf-8"
    status, _, body = get(app, "/web/main.js", if_none_match=headers["etag"])
    assert status == 304 and body == b""


@pytest.mark.parametrize("path", ["/web/routes.py", "/web/..%2froutes.py", "/web/nothing.js", "/web/"])
def test_nothing_else_is_served(app: FastAPI, path: str) -> None:
    assert get(app, path)[0] == 404


def test_the_live_stream_tells_of_the_engine_again_after_a_restart(app: FastAPI, client: Client) -> None:
    status, headers, body = get(app, "/web/live")
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    events = [part.split("\n", 1) for part in body.decode().strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == ["engine", "snapshot", "snapshot", "engine", "snapshot"]
    engine = json.loads(events[0][1].removeprefix("data: "))
    assert engine["models"] == ["tiny"] and engine["kernels"][0]["refused"][0]["reason"] == "its priority is lower"
    assert client.closed


def test_no_file_names_another_host_or_makes_html_of_text() -> None:
    for name, text in files().items():
        plain = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}", plain), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    page = files()["index.html"]
    assert not re.search(r"\son[a-z]+=|\sstyle=|<script>|javascript:", page)


def test_every_word_is_there_in_both_languages() -> None:
    shown = files()
    languages = re.split(r"^  (en|zh): \{$", shown["i18n.js"], flags=re.M)
    words = {
        language: dict(re.findall(r"(\w+): \"((?:[^\"\\]|\\.)*)\"", block))
        for language, block in zip(languages[1::2], languages[2::2])
    }
    assert words["en"].keys() == words["zh"].keys() and len(words["en"]) > 80
    for name in words["en"]:
        holes = [sorted(re.findall(r"\{\d\}", words[language][name])) for language in ("en", "zh")]
        assert holes[0] == holes[1], name
    used = set(re.findall(r"data-i18n(?:-label|-placeholder)?=\"(\w+)\"", shown["index.html"]))
    for name, text in shown.items():
        if name.endswith(".js"):
            used |= set(re.findall(r"\bt\(\"(\w+)\"", text))
    assert used <= words["en"].keys(), used - words["en"].keys()


def test_every_id_that_scripts_ask_for_is_on_the_page() -> None:
    shown = files()
    ids = set(re.findall(r"\bid=\"([\w-]+)\"", shown["index.html"]))
    asked = {found for text in shown.values() for found in re.findall(r"byId\(\"([\w-]+)\"\)", text)}
    assert asked <= ids, asked - ids
