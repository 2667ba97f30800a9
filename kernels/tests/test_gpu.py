"""What GPUs share: the device's refusal of a wrong index, the order of a capture, and telling builds of torch apart."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dougong.errors import BackendNotFoundError
from dougong_kernels.gpu import GpuDevice
from dougong_kernels.graphs import GpuGraphs
from dougong_kernels.torch_build import torch_build


class Module:
    """torch.cuda's names as far as they are used, keeping a log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = self._stream("main")

    def _stream(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    def Stream(self, index: int) -> Any:
        return self._stream("side")

    def current_stream(self) -> Any:
        return self.main

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")

    def graph_pool_handle(self) -> str:
        return "pool"

    def graph(self) -> Any:
        return SimpleNamespace(
            capture_begin=lambda **options: self.log.append(f"begin {sorted(options)}"),
            capture_end=lambda: self.log.append("end"),
            replay=lambda: self.log.append("replay"),
        )


def test_a_capture_is_ordered_between_the_streams() -> None:
    module = Module()
    graphs = GpuGraphs(module, 0, module.graph, {"capture_error_mode": "thread_local"})
    graph = graphs.new(graphs.new_pool())
    with graph.capture():
        module.log.append("work")
    graph.replay()
    assert module.log == [
        "side waits for main", "on side", "begin ['capture_error_mode', 'pool']", "work", "end", "off side",
        "main waits for side", "replay",
    ]  # fmt: skip


def test_a_capture_that_fails_is_ended() -> None:
    module = Module()
    graph = GpuGraphs(module, 0, module.graph).new()
    with pytest.raises(RuntimeError, match="kernel failed"), graph.capture():
        raise RuntimeError("kernel failed")
    assert "end" in module.log


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card(GpuDevice):
        type = "cuda"
        kind = "ROCm"
        visible = "HIP_VISIBLE_DEVICES"

    fake = SimpleNamespace(device_count=lambda: 2, get_device_properties=lambda index: SimpleNamespace(name="card"))
    monkeypatch.setattr(torch, "cuda", fake)
    assert Card(1).name == "card"
    with pytest.raises(BackendNotFoundError, match=r"device_index=2 .* 2 ROCm device.*HIP_VISIBLE_DEVICES"):
        Card(2)


@pytest.mark.parametrize(
    ("lines", "kind", "toolkit"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\nxpu: Optional[str] = None", "CUDA", "13.0"),
        (
            "cuda: Optional[str] = None\nhip: Optional[str] = '7.1.52802'\nxpu: Optional[str] = None",
            "ROCm",
            "7.1.52802",
        ),
        ('cuda = None\nhip = None\nxpu = "20260100"', "XPU", "20260100"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None", "CPU", ""),
    ],
)
def test_builds_are_told_apart(tmp_path: Path, lines: str, kind: str, toolkit: str) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{lines}\n")
    build = torch_build(tmp_path)
    assert build is not None and build.kind == kind and build.minor == (2, 13)
    assert (build.cuda or build.hip or build.xpu) == toolkit


def test_this_torch_is_seen_as_it_is() -> None:
    build = torch_build()
    assert build is not None and build.version == torch.__version__
    assert bool(build.hip) == bool(torch.version.hip) and bool(build.cuda) == bool(torch.version.cuda)


def test_no_torch_is_no_build(tmp_path: Path) -> None:
    assert torch_build(tmp_path) is None
