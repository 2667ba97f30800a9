"""The same promises on a device that is not the host, in a process of its own: torch names only one such device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def on_sim(*arguments: str) -> str:
    environment = os.environ | {"DOUGONG_E2E_BACKEND": "sim", "PYTEST_XDIST_AUTO_NUM_WORKERS": "0"}
    for name in ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    ended = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    return ended.stdout


pytestmark = pytest.mark.skipif(find_spec("dougong_sim") is None, reason="the simulated device is not installed")


@pytest.mark.prove  # `make test` has plugins/sim/tests/test_engine.py: the engine on the device, graphs included
@pytest.mark.timeout(600)
def test_some_of_it_on_the_simulated_device() -> None:
    ways = "gemma-chunks-7-overlap or gemma-batched-overlap or gemma-eager-overlap or llama-batched-in-turn"
    shown = on_sim(str(HERE / "test_greedy_matrix.py"), "-m", "not prove", "-k", f"{ways} or too_small or second_run")
    assert "8 passed" in shown


@pytest.mark.prove
@pytest.mark.timeout(1200)
def test_all_of_it_on_the_simulated_device() -> None:
    on_sim(str(HERE / "test_greedy_matrix.py"), str(HERE / "test_answers.py"), str(HERE / "test_bad_requests.py"))
