"""The device against a torch that says it is ROCm's, and what it offers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dougong_rocm
from dougong.errors import BackendNotFoundError
from dougong.hal.backend import find_backends
from dougong.plugins import load_plugins, resolve_target
from dougong_rocm.device import RocmDevice


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch as on a machine with one MI300; the test may change ``gcnArchName``."""
    properties = SimpleNamespace(
        name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, warp_size=64
    )
    monkeypatch.setattr(torch.version, "hip", "7.1.52802")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return properties


@pytest.mark.parametrize(
    ("target", "wave", "fp8"),
    [
        ("gfx942:sramecc+:xnack-", 64, torch.float8_e4m3fnuz), ("gfx950", 64, torch.float8_e4m3fn),
        ("gfx90a", 64, torch.float8_e4m3fn), ("gfx1201", 32, torch.float8_e4m3fn),
    ],
)  # fmt: skip
def test_facts(amd: Any, target: str, wave: int, fp8: torch.dtype) -> None:
    amd.gcnArchName, amd.warp_size = target, wave
    device = RocmDevice(0)
    assert device.fp8_dtype == fp8 and device.dist_backend == "nccl"
    assert device.facts()["wave size"] == wave and device.facts()["target"].startswith(target.split(":")[0])
    assert device.graphs is not None and device.name == "AMD Instinct MI300X"


def test_wrong_builds_and_devices_are_refused(amd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendNotFoundError, match="HIP_VISIBLE_DEVICES"):
        RocmDevice(3)
    amd.gcnArchName = "gfx906"
    with pytest.raises(BackendNotFoundError, match=r"gfx906: the kernels are compiled for gfx90a"):
        RocmDevice(0)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(BackendNotFoundError, match="no ROCm build"):
        RocmDevice(0)


def test_kernels_go_to_amd_only(amd: Any) -> None:
    plugins = load_plugins(entries=(), extra=[("rocm", dougong_rocm)])
    specs = [spec for _, spec in plugins.records("dougong_kernels", device=RocmDevice(0))]
    assert specs[0].provider == "aiter" and {spec.op for spec in specs} >= {"attention", "sample", "linear"}
    assert all(callable(resolve_target(spec.target)) for spec in specs)
    assert not list(plugins.records("dougong_kernels", device=SimpleNamespace(type="cuda", is_nvidia=True)))
    assert [report.spec.name for report in find_backends(plugins)] == ["rocm"]
