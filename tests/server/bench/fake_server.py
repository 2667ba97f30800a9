"""A small OpenAI-like server that answers every request as told, and notes what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["USAGE", "Fake", "chat_events", "event", "fake_server"]

USAGE = {
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
    "choices": [],
}


@dataclass
class Fake:
    """Answers ``events`` to every POST; counts how many are open."""

    url: str = ""
    status: int = 200
    events: list[str] = field(default_factory=list)
    metrics: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open: int = 0
    most: int = 0
    gate: threading.Barrier | None = None


@contextmanager
def fake_server() -> Iterator[Fake]:
    state = Fake()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            return None

        def do_GET(self) -> None:
            body = (state.metrics if self.path == "/metrics" else json.dumps({"data": [{"id": "tiny"}]})).encode()
            self.send_response(200 if state.status == 200 else state.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            with lock:
                state.open += 1
                state.most = max(state.most, state.open)
            length = int(self.headers["Content-Length"])
            state.bodies.append(json.loads(self.rfile.read(length)) | {"path": self.path})
            state.headers.append(dict(self.headers))
            if state.gate is not None:
                state.gate.wait(10)
            self.send_response(state.status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in state.events:
                data = event.encode()
                half = len(data) // 2  # an event may come in two pieces
                for part in (data[:half], data[half:]):
                    if part:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            with lock:
                state.open -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def chat_events(*texts: str) -> list[str]:
    deltas = [event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})]
    deltas += [event({"choices": [{"delta": {"content": text}}]}) for text in texts]
    return [*deltas, event({"choices": [{"delta": {}, "finish_reason": "stop"}]}), event(USAGE), "data: [DONE]\n\n"]
