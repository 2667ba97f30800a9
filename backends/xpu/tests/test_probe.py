"""The probe names what is missing and what to do, in the order in which one would mend it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dougong_kernels.torch_build import TorchBuild
from dougong_xpu.probe import probe

XPU = TorchBuild("2.13.0+xpu", xpu="20260000")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A display controller of another vendor, an Intel card, and Level Zero."""
    for name, vendor, device in (("renderD128", "0x1002", "0x73ff"), ("renderD129", "0x8086", "0xe20b")):
        folder = tmp_path / "sys/class/drm" / name / "device"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
        (tmp_path / "dev/dri").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev/dri" / name).touch()
    (tmp_path / "usr/lib64").mkdir(parents=True)
    (tmp_path / "usr/lib64/libze_loader.so.1").touch()
    return tmp_path


def test_all_is_there(machine: Path) -> None:
    found = probe(machine, lambda: XPU, lambda: True)
    assert found.ok and found.devices == ("0xe20b (renderD129)",)


@pytest.mark.parametrize(
    ("build", "triton", "reason", "remedy"),
    [
        (None, True, "torch is not installed", "XPU build"),
        (TorchBuild("2.13.0", cuda="13.0"), True, "is a CUDA build, not an XPU one", "XPU build"),
        (TorchBuild("2.13.0+rocm7.1", hip="7.1"), True, "is a ROCm build, not an XPU one", "XPU build"),
        (TorchBuild("2.7.1+xpu", xpu="20250101"), True, "too old: 2.8", "2.8 or newer"),
        (XPU, False, "Triton is not installed", "Triton of this torch"),
    ],
)
def test_software(machine: Path, build: TorchBuild | None, triton: bool, reason: str, remedy: str) -> None:
    found = probe(machine, lambda: build, lambda: triton)
    assert not found.ok and reason in found.reason and remedy in found.remedy


def test_device_permission_and_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "usr/lib64/libze_loader.so.1").unlink()
    assert "Level Zero was not found" in probe(machine, lambda: XPU).reason
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        found = probe(machine, lambda: XPU)
        assert "renderD129" in found.reason and "render" in found.remedy
    (machine / "sys/class/drm/renderD129/device/vendor").write_text("0x10de\n")
    found = probe(machine, lambda: XPU)
    assert "no Intel GPU" in found.reason and "--device=/dev/dri" in found.remedy


def test_this_machine_answers() -> None:
    assert isinstance(probe().ok, bool)
