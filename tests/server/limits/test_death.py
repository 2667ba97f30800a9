"""The engine's process is killed under load; the server is told to stop. Every client gets an answer or an error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_harness import served

from dougong.server.process.observer import RequestObserver
from dougong.types import RequestOutput


class Deaths(RequestObserver):
    """Counts ends, and keeps the causes of deaths."""

    def __init__(self) -> None:
        self.ends = 0
        self.causes: list[str] = []

    def finished(self, output: RequestOutput) -> None:
        self.ends += 1

    def engine_died(self, cause: str) -> None:
        self.causes.append(cause)


@pytest.mark.prove
def test_kill_9_under_load_answers_everybody_and_the_next_request_works(tiny_model: Path) -> None:
    with served(tiny_model) as server:
        seen = Deaths()
        server.client.observers.append(seen)
        body: Any = {"model": "tiny", "prompt": "ab", "max_tokens": 400, "ignore_eos": True}

        async def one(client: httpx.AsyncClient, stream: bool) -> str:
            answer = await client.post(f"{server.url}/v1/completions", json=body | {"stream": stream}, timeout=60)
            if stream:
                assert answer.text.endswith("data: [DONE]\n\n")
                return answer.text
            assert answer.status_code in (200, 500, 503)
            return answer.text

        async def load() -> list[str]:
            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
                tasks = [asyncio.ensure_future(one(client, bool(i % 2))) for i in range(40)]
                while server.client.num_completions < 40:
                    await asyncio.sleep(0.01)
                os.kill(server.client.info.pid, signal.SIGKILL)
                return await asyncio.gather(*tasks)

        texts = asyncio.run(load())
        assert len(texts) == 40
        assert sum("SIGKILL" in text for text in texts) > 20
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=60) as client:
            after = client.completions.create(model="tiny", prompt="ab", max_tokens=3)
        assert after.usage is not None
        assert len(seen.causes) == server.client.restarts == 1
        assert "SIGKILL" in seen.causes[0]
        assert seen.ends == 41
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "restarts": 1}


class Process:
    """``dougong serve`` as a user starts it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "dougong", "serve", *arguments, "--port", "0", "--backend", "cpu"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._ready.wait(60) or not self.url:
            self.close()
            raise AssertionError("".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"https?://[\d.]+:\d+", line)
            if found is not None:
                self.url = found[0]
                self._ready.set()
        self._ready.set()

    def end(self, timeout: float) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.close()

    def close(self) -> None:
        """Leave nothing behind, whatever the test found."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts servers, and ends those that the test has not ended."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Process:
            process = Process(*arguments)
            stack.callback(process.close)
            return process

        yield start


@pytest.mark.prove
def test_sigterm_lets_streams_finish_and_a_second_one_ends_at_once(
    tiny_model: Path, start: Callable[..., Process]
) -> None:
    body: Any = {"prompt": "ab", "max_tokens": 300, "ignore_eos": True, "stream": True}
    server = start(str(tiny_model), "--max-num-seqs", "4", "--num-kv-blocks", "64")
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert list(lines)[-2] == "data: [DONE]"
    assert server.end(30) == 0
    assert any("may finish" in line for line in server.lines)

    server = start(str(tiny_model), "--max-num-seqs", "1", "--num-kv-blocks", "64")
    started = time.monotonic()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"n": 100}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
        assert any("error" in line for line in rest[-4:])
    assert server.end(30) == 0
    assert time.monotonic() - started < 25


HELLO: Any = [{"role": "user", "content": "a"}]
ASKS: dict[str, Any] = {
    "chat/completions": {"messages": HELLO, "max_tokens": 4, "response_format": {"type": "json_object"}},
    "completions": {"prompt": "a", "max_tokens": 4, "logprobs": 2},
    "embeddings": {"input": ["a", "b"]},
    "messages": {"messages": HELLO, "max_tokens": 4},
    "responses": {"input": "a", "max_output_tokens": 4},
}


@pytest.mark.prove
def test_the_process_that_speaks_http_has_no_torch_and_its_engine_ends_with_it(
    tiny_model: Path, start: Callable[..., Process]
) -> None:
    server = start(str(tiny_model), "--num-kv-blocks", "64")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert children
    name = {"model": str(tiny_model)}
    for path, body in ASKS.items():
        answer = httpx.post(f"{server.url}/v1/{path}", json=body | name, timeout=60)
        assert answer.status_code == 200, answer.text
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    server.process.kill()
    server.end(10)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
