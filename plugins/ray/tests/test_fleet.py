"""A fleet of two replicas on this machine: one killed under load, a rolling update to a mixed fleet, the HTTP app.

Ray is large, so it is no part of the development environment: without it, an environment of its own is made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]


def python_with_ray(folder: Path) -> str:
    """This interpreter where it has Ray, the one in DOUGONG_RAY_PYTHON, or a new environment over this one's."""
    if importlib.util.find_spec("ray") is not None:
        return sys.executable
    if given := os.environ.get("DOUGONG_RAY_PYTHON"):
        return given
    venv.EnvBuilder().create(folder)
    (inner,) = folder.glob("lib/python*/site-packages")
    (inner / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in paths()))
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--prefix", str(folder)]
    done = subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), "ray[serve]"], check=False)
    if done.returncode != 0:
        pytest.skip("Ray cannot be installed here")
    return python


def paths() -> list[str]:
    return [path for path in site.getsitepackages() if Path(path).is_dir()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = python_with_ray(tmp_path_factory.mktemp("ray") / "venv")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("fleet_run.py")
    done = subprocess.run(
        [python, str(script)], env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return answer


def test_every_request_is_answered(ran: dict[str, Any]) -> None:
    calm = ran["undisturbed"]
    assert calm["errors"] == [None] * 10
    assert calm["reasons"] == ["length"] * 10
    assert [len(tokens) for tokens in calm["tokens"]] == [24] * 10


def test_no_request_is_lost_with_a_replica_and_tokens_stay(ran: dict[str, Any]) -> None:
    killed = ran["killed"]
    assert killed["streamed"] >= 8, "the kill came before or after the load"
    assert ran["lost"] >= 1, "the replica that was killed had no request"
    assert killed["errors"] == [None] * 10
    assert killed["tokens"] == ran["undisturbed"]["tokens"]
    assert killed["texts"] == ran["undisturbed"]["texts"]


def test_the_lost_replica_is_replaced(ran: dict[str, Any]) -> None:
    assert ran["replaced"]


def test_a_known_prefix_finds_its_replica(ran: dict[str, Any]) -> None:
    assert ran["cached"] >= 48


def test_a_rolling_update_loses_nothing_and_may_mix_backends(ran: dict[str, Any]) -> None:
    assert ran["updated"]["errors"] == [None] * 10
    assert ran["updated"]["tokens"] == ran["undisturbed"]["tokens"]
    assert ran["mixed"] == ["cpu", "sim"]
    assert ran["new"]


def test_the_openai_server_stands_in_front(ran: dict[str, Any]) -> None:
    status, body = ran["http"]
    assert status == 200, body
    assert "Paris" in body["choices"][0]["text"]
    assert body["usage"]["completion_tokens"] == 8
