"""The parent's handle on one worker process: cases go out in batches, answers come back one by one, each with its own
deadline. A worker that dies, hangs or talks nonsense costs one case and is replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong_compat.target import OpenError, Target
from dougong_compat.wire import BadFrame, Closed, TimedOut, receive, send

__all__ = ["Answer", "OpenError", "Target", "Worker"]

_BATCH = 32


@dataclass
class Answer:
    """What came of one request. ``fate`` is ``answered``, ``crash`` or ``timeout``."""

    fate: str
    message: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    detail: str = ""


class Worker:
    """One process at a time. Use as a context manager."""

    def __init__(self, target: Target, *, timeout: float = 60.0, environment: dict[str, str] | None = None) -> None:
        self.target = target
        self.timeout = timeout
        self.environment = environment or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.facts: dict[str, Any] = {}
        self.restarts = 0
        self._log: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Start the process and open the backend; its facts.

        Raises:
            OpenError: the backend cannot be opened; the message is the worker's.
        """
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **self.environment}
        environment["PYTHONPATH"] = os.pathsep.join([*(p for p in sys.path if p), environment.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dougong_compat.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment,
        )  # fmt: skip
        theirs.close()
        self.socket = ours
        return self.open(self.target)

    def open(self, target: Target) -> dict[str, Any]:
        """Put another backend under test in the same process; its facts."""
        self.target = target
        if self.socket is None:
            return self.start()
        request = {"do": "open", "backend": target.backend, "plugins": list(target.plugins), "mutant": target.mutant}
        try:
            send(self.socket, request)
            message, _ = receive(self.socket, time.monotonic() + max(self.timeout, 120.0))
        except (Closed, BadFrame, TimedOut, OSError) as error:
            text = f"the worker {self._cause(error)} while opening backend {target.backend!r}"
            self.stop()
            raise OpenError(text) from error
        if "open_error" in message:
            self.stop()
            raise OpenError(message["open_error"])
        self.facts = message["facts"]
        return self.facts

    def stop(self) -> None:
        """End the process, whatever state it is in."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        if self.process is not None:
            if self.process.poll() is None:
                try:
                    self.process.wait(0.5)
                except subprocess.TimeoutExpired:
                    self.process.kill()
            self.process.wait()
            self.process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    # -- work ----------------------------------------------------------------------------------------------

    def ask(self, requests: Sequence[dict[str, Any]]) -> Iterator[Answer]:
        """One answer per request, in order; the next is computed while the caller looks at this one."""
        at = 0
        while at < len(requests):
            if self.socket is None:
                self.restarts += 1
                self.start()
            batch = requests[at : at + _BATCH]
            fates = self._batch(batch)
            for answer in fates:
                at += 1
                yield answer

    def _batch(self, batch: Sequence[dict[str, Any]]) -> Iterator[Answer]:
        """Answers to a prefix of ``batch``: all of it, or up to the case that ended the worker."""
        assert self.socket is not None
        try:
            send(self.socket, {"do": "cases", "cases": list(batch)})
        except OSError as error:
            yield self._lost(Closed(str(error)))
            return
        for request in batch:
            limit = float(request.get("timeout", self.timeout))
            try:
                message, tensors = receive(self.socket, time.monotonic() + limit)
            except (Closed, BadFrame, TimedOut) as error:
                yield self._lost(error)
                return
            if message.get("id") != request["id"]:
                yield self._lost(BadFrame(f"an answer to {message.get('id')!r} came for {request['id']!r}"))
                return
            yield Answer("answered", message, tensors)

    def _lost(self, error: Exception) -> Answer:
        detail = f"the worker {self._cause(error)}"
        tail = self.tail()
        self.stop()
        return Answer(
            "timeout" if isinstance(error, TimedOut) else "crash", detail=f"{detail}; {tail}" if tail else detail
        )

    def _cause(self, error: Exception) -> str:
        if isinstance(error, TimedOut):
            return "did not answer in time"
        if isinstance(error, BadFrame):
            return f"sent something that is no answer ({error})"
        assert self.process is not None
        try:
            code = self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def tail(self, limit: int = 400) -> str:
        """The end of what the worker printed."""
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - limit))
        return " ".join(self._log.read().decode(errors="replace").split())
