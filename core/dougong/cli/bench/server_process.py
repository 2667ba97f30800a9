"""A server of our own for the time of a benchmark, and what any server tells of itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from dougong.errors import EngineError

__all__ = ["EngineFigures", "engine_figures", "served_model", "server"]

_START_S = 300.0


@contextmanager
def server(model: str, options: Sequence[str] = ()) -> Iterator[str]:
    """`dougong serve MODEL` on a free port of this machine; gives its address, ends it afterwards.

    Raises:
        EngineError: it did not start; with the last lines that it wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "dougong", "serve", model, "--host", "127.0.0.1", "--port", str(port), "--log-level",
        "warning", *options,
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            _wait_for(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < _START_S:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    log.seek(0)
    tail = "".join(log.readlines()[-12:]).strip()
    how = "ended" if process.poll() is not None else f"was not ready within {_START_S:.0f} s"
    raise EngineError(f"`dougong serve` {how}:\n{tail}")


def served_model(url: str, api_key: str | None) -> str:
    """The first model of ``url`` (which ends in /v1)."""
    from dougong.cli.remote import Remote

    names = Remote(url, api_key).models()
    if not names:
        raise EngineError(f"{url} serves no model; name one with --model.")
    return names[0]


class EngineFigures:
    """A dougong server's own sums, from its /metrics."""

    __slots__ = ("cpu_s", "parts_s", "steps", "wall_s")

    def __init__(self, steps: float, wall_s: float, cpu_s: float, parts_s: dict[str, float]) -> None:
        self.steps, self.wall_s, self.cpu_s, self.parts_s = steps, wall_s, cpu_s, parts_s

    def since(self, before: EngineFigures) -> dict[str, object] | None:
        """Per step between two looks; None if there was no step."""
        steps = self.steps - before.steps
        if steps <= 0:
            return None
        return {
            "steps": int(steps),
            "cpu_us_per_step": round(1e6 * (self.cpu_s - before.cpu_s) / steps, 1),
            "wall_us_per_step": round(1e6 * (self.wall_s - before.wall_s) / steps, 1),
            "wall_us_by_part": {
                part: round(1e6 * (seconds - before.parts_s.get(part, 0.0)) / steps, 1)
                for part, seconds in self.parts_s.items()
            },
        }


_SAMPLE = re.compile(r"^(dougong:[a-z_]+)(?:\{([^}]*)\})? (\S+)$", re.M)


def engine_figures(url: str, api_key: str | None = None) -> EngineFigures | None:
    """None where the server is not dougong's or shows no metrics."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url.removesuffix('/v1')}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read().decode()
    except (OSError, ValueError):
        return None
    sums: dict[str, float] = {}
    parts: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
        part = re.search(r'part="(\w+)"', labels or "")
        if name == "dougong:step_part_seconds_total" and part:
            parts[part.group(1)] = float(value)
    if "dougong:step_time_seconds_count" not in sums:
        return None
    return EngineFigures(
        sums["dougong:step_time_seconds_count"], sums["dougong:step_time_seconds_sum"],
        sums["dougong:engine_cpu_seconds_total"], parts,
    )  # fmt: skip
