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

__all__ = ["Answer", "Clock", "OpenError", "Target", "Worker"]

_BATCH = 32
#: Failed starts in a row after which a worker is given up.
_STARTS = 3


class Clock:
    """When a run must end: after ``budget`` seconds, or as soon as ``stop`` is called."""

    def __init__(self, budget: float | None = None) -> None:
        self.deadline = float("inf") if budget is None else time.monotonic() + budget
        self.interrupted = False

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def stop(self) -> None:
        self.deadline = time.monotonic()


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
        self.started = False
        self._failed_starts, self._why = 0, ""
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
        facts = self.open(self.target)
        self.started = True
        return facts

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

    def kill(self) -> None:
        """End the process at once, from any thread: whoever waits for it sees its connection closed."""
        process = self.process
        if process is not None and process.poll() is None:
            process.kill()

    # -- work ----------------------------------------------------------------------------------------------

    def ask(self, requests: Sequence[dict[str, Any]], clock: Clock | None = None) -> Iterator[Answer]:
        """One answer per request, in order; the next is computed while the caller looks at this one.

        Ends early when ``clock`` is over: a case cut off then has no answer. A worker that ended and cannot be started
        again is a crash of every case that is left.

        Raises:
            OpenError: the first start failed.
        """
        clock = clock or Clock()
        at = 0
        while at < len(requests) and not clock.over:
            if self.socket is None and (lost := self._start_again()) is not None:
                at += 1
                yield lost
                continue
            for answer in self._batch(requests[at : at + _BATCH], clock):
                if clock.over and answer.fate != "answered":
                    return
                at += 1
                yield answer
                if clock.over:
                    self.stop()
                    return

    def _start_again(self) -> Answer | None:
        """A new process in place of the one that ended; what becomes of the case at hand if there is none."""
        if not self.started:
            self.start()
            return None
        if self._failed_starts < _STARTS:
            self.restarts += 1
            try:
                self.start()
            except OpenError as error:
                self._failed_starts += 1
                self._why = str(error)
            else:
                self._failed_starts = 0
                return None
        return Answer("crash", detail=f"the worker ended and cannot be started again: {self._why}")

    def _batch(self, batch: Sequence[dict[str, Any]], clock: Clock) -> Iterator[Answer]:
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
                message, tensors = receive(self.socket, min(time.monotonic() + limit, clock.deadline))
            except (Closed, BadFrame, TimedOut) as error:
                yield self._lost(error)
                return
            if message.get("id") != request["id"]:
                yield self._lost(BadFrame(f"an answer to {message.get('id')!r} came for {request['id']!r}"))
                return
            if message.get("last"):  # its device is lost: the next case is a new worker's
                self.stop()
                yield Answer("answered", message, tensors)
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
