"""The package is import-light, says why it cannot run, and builds once however many processes ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dougong.errors import ConfigError, PluginLoadError
from dougong_sim import build, probe
from dougong_sim.settings import Settings, read_settings


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library_path.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.library_path.cache_clear()


def test_declaring_and_probing_import_nothing_heavy() -> None:
    done = run(
        "import sys, dougong_sim\n"
        "assert dougong_sim.probe().ok, dougong_sim.probe()\n"
        "list(dougong_sim.dougong_backends())\n"
        "print([name for name in ('torch', 'numpy', 'dougong.hal') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_no_compiler_is_a_reason(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert probe().ok
    monkeypatch.setenv("PATH", str(elsewhere))
    found = probe()
    assert not found.ok
    assert found.reason == "no C++ compiler (c++, g++, clang++) was found"
    assert "CXX" in found.remedy
    with pytest.raises(PluginLoadError, match="no C\\+\\+ compiler"):
        build.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler was not found" in probe().reason


def test_an_earlier_build_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.library_path().exists()  # conftest.py opened the device
    assert probe().ok


@pytest.mark.parametrize(
    "found, reason", [("2.10.1+cpu", "too old"), ("", "not installed"), ("2.13.0+cpu", ""), ("3.0.0", "")]
)
def test_torch_version(found: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "torch_version", lambda: found)
    assert reason in build.obstacle()[0]
    assert bool(build.obstacle()[0]) == bool(reason)


def test_a_failing_compiler_is_reported(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = elsewhere / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no header today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(PluginLoadError, match=r"did not compile with .*broken-c\+\+[\s\S]*no header today"):
        build.build()
    assert not build.library_path().exists()


def test_two_processes_build_once(elsewhere: Path) -> None:
    log = elsewhere / "calls"
    compiler = elsewhere / "slow-c++"
    compiler.write_text(
        f'#!/bin/sh\necho call >> {log}\nsleep 1\nwhile [ "$1" != "-o" ]; do shift; done\necho library > "$2"\n'
    )
    compiler.chmod(0o755)
    code = "from dougong_sim.build import build; print(build().read_text().strip())"
    env = {**os.environ, "CXX": str(compiler)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["library", "library"]
    assert log.read_text().split() == ["call"]


def test_a_folder_that_cannot_be_written(elsewhere: Path) -> None:
    (elsewhere / "dougong").write_text("a file in the way")
    with pytest.raises(PluginLoadError, match="XDG_CACHE_HOME"):
        build.build()


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMORY", "DEVICES", "POISON"):
        monkeypatch.delenv(f"DOUGONG_SIM_{name}", raising=False)
    assert read_settings() == Settings(devices=2, memory=4 << 30, poison=False)
    monkeypatch.setenv("DOUGONG_SIM_MEMORY", str(1 << 20))
    monkeypatch.setenv("DOUGONG_SIM_DEVICES", "3")
    assert read_settings() == Settings(devices=3, memory=1 << 20)
    for name, value in (("MEMORY", "4GiB"), ("MEMORY", "0"), ("DEVICES", "17"), ("POISON", "2")):
        monkeypatch.setenv(f"DOUGONG_SIM_{name}", value)
        with pytest.raises(ConfigError, match=f"DOUGONG_SIM_{name}='{value}'"):
            read_settings()
        monkeypatch.delenv(f"DOUGONG_SIM_{name}")


def test_another_name_and_other_settings() -> None:
    """The same extension under another vendor's name, in a process of its own."""
    done = run(
        "import torch\n"
        "from dougong_sim.extension import install\n"
        "module = install('npu')\n"
        "assert module is torch.npu is torch.get_device_module('npu')\n"
        "x = torch.empty(4, device='npu:2')\n"
        "assert x.isnan().all() and x.is_npu\n"
        "assert torch.npu.device_count() == 3 and torch.npu.mem_get_info(2) == ((1 << 20) - 64, 1 << 20)\n"
        "try:\n"
        "    torch.empty(1 << 20, device='npu')\n"
        "except torch.OutOfMemoryError as error:\n"
        "    print(error)\n",
        DOUGONG_SIM_DEVICES="3",
        DOUGONG_SIM_MEMORY=str(1 << 20),
        DOUGONG_SIM_POISON="1",
    )
    assert done.stdout.startswith("npu out of memory. Tried to allocate 4.00 MiB"), done.stderr


def test_one_thread_stays_one_thread() -> None:
    done = run(
        "import torch, threading\n"
        "from dougong_sim.device import SimDevice\n"
        "x = torch.ones(512, 512, device='sim'); (x @ x).softmax(-1)\n"
        "print(torch.get_num_threads(), len([t for t in __import__('os').listdir('/proc/self/task')]))\n",
        OMP_NUM_THREADS="1",
    )
    threads = done.stdout.split()
    assert threads[0] == "1", done.stderr
    assert int(threads[1]) == 1
