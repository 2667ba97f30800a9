"""Crashes, hangs and garbage are outcomes; the next case is answered by a new worker."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dougong_compat.execute import stress
from dougong_compat.outcome import Outcome
from dougong_compat.pool import OpenError, Target, Worker
from dougong_compat.selftest.lab import Lab
from dougong_compat.wire import BadFrame, Closed, TimedOut, receive, send

CASE = "L1/attention/mandatory/decode-h4k1-d64"


@pytest.mark.parametrize(
    ("backend", "outcome", "part"),
    [
        ("bad-segfault", Outcome.CRASH, "SIGSEGV"),
        ("bad-exit", Outcome.CRASH, "status 7"),
        ("bad-prints", Outcome.CRASH, "no answer"),
    ],
)
def test_a_dying_worker_is_an_outcome(lab: Lab, backend: str, outcome: Outcome, part: str) -> None:
    result = lab.judge(CASE, backend)
    assert result.outcome is outcome and part in result.message
    assert lab.judge(CASE).outcome is Outcome.PASS


def test_a_hang_is_a_timeout(lab: Lab) -> None:
    lab.worker.timeout, kept = 1.5, lab.worker.timeout
    try:
        assert lab.judge(CASE, "bad-hang").outcome is Outcome.TIMEOUT
    finally:
        lab.worker.timeout = kept
    assert lab.judge(CASE).outcome is Outcome.PASS


def test_a_leak_fails_its_case(lab: Lab) -> None:
    case = "L4/stress/leak/decode-h8k2-d64"
    assert lab.judge(case).outcome is Outcome.PASS
    assert lab.judge(case, "bad-leak").outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("each", "once", "leaks"), [(0, 0, False), (0, 4096, False), (512, 0, True), (512, 4096, True)]
)
def test_device_memory_that_calls_keep_is_a_leak(
    monkeypatch: pytest.MonkeyPatch, each: int, once: int, leaks: bool
) -> None:
    """What grows with every call, but not a workspace that the seventh makes for all."""
    calls = 0

    def call(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(stress, "run_problem", call)
    monkeypatch.setattr(stress, "build", lambda *_: None)
    counted = SimpleNamespace(memory_allocated=lambda index: each * calls + (once if calls > 6 else 0))
    for module, seen in ((counted, True), (torch.cpu, False)):
        device = SimpleNamespace(module=module, index=0, synchronize=lambda: None)
        message: dict[str, Any] = {}
        stress.execute(SimpleNamespace(device=device), {"params": {"check": "leak"}, "seed": 1}, message, {})
        assert [held for what, held in message["checks"] if "bytes" in what] == ([not leaks] if seen else [])


def test_unknown_backend_is_an_open_error() -> None:
    with Worker(Target("no-such-thing")) as worker, pytest.raises(OpenError, match="no-such-thing"):
        worker.start()


def test_frames_survive_every_dtype_and_reject_rubbish() -> None:
    a, b = socket.socketpair()
    tensors = {
        "x": torch.randn(3, 2).bfloat16(), "y": torch.zeros(0, 4), "z": torch.tensor([1, -2], dtype=torch.int8),
        "f": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    }  # fmt: skip
    send(a, {"id": "q"}, tensors)
    message, got = receive(b, time.monotonic() + 5)
    assert message == {"id": "q"}
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8))
    with pytest.raises(TimedOut):
        receive(b, time.monotonic() + 0.05)
    a.sendall(b"hello, this is certainly no frame of ours")
    with pytest.raises(BadFrame):
        receive(b, time.monotonic() + 5)
    a.close()
    while b.recv(4096):  # the rest of the rubbish
        pass
    with pytest.raises(Closed):
        receive(b, time.monotonic() + 5)
    b.close()
