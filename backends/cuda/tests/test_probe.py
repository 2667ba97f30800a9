"""What the probe answers, with a driver that is none, and builds of torch that are not installed."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import pytest

from dougong_kernels.torch_build import TorchBuild

module = importlib.import_module("dougong_cuda.probe")  # the package gives the function under this name
CUDA = TorchBuild("2.11.0+cu130", cuda="13.0")


class Driver:
    """libcuda's calls. ``cards``: (name, major) of each device."""

    def __init__(self, *cards: tuple[str, int], status: int = 0, version: int = 13000) -> None:
        self.cards, self.status, self.version = cards, status, version

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, size: int, device: ctypes.c_int) -> int:
        out.value = self.cards[device.value][0].encode()
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: ctypes.c_int) -> int:
        assert attribute == 75
        out._obj.value = self.cards[device.value][1]
        return 0


def ask(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, build: TorchBuild | None = CUDA, triton: bool = True
) -> Any:
    def load(name: str) -> Any:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    monkeypatch.setattr(module, "torch_build", lambda: build)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if triton else None)
    return module.probe()


def test_a_card_that_will_do_is_named_and_older_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(monkeypatch, Driver(("NVIDIA H100", 9), ("Tesla T4", 7), ("NVIDIA A10", 8)))
    assert found.ok and found.devices == ("NVIDIA H100", "NVIDIA A10") and found.reason == "2 device(s)"


def test_a_driver_of_an_older_minor_version_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = TorchBuild("2.13.0+cu132", cuda="13.2")
    assert ask(monkeypatch, Driver(("NVIDIA H100", 9), version=13000), newer).ok


@pytest.mark.parametrize(
    ("driver", "build", "triton", "reason", "remedy"),
    [
        (None, CUDA, True, "no NVIDIA driver was found", "Install NVIDIA's driver"),
        (Driver(status=100), CUDA, True, "finds no device (cuInit gave 100: there is none)", "CUDA_VISIBLE_DEVICES"),
        (Driver(status=803), CUDA, True, "cuInit gave 803: the driver's library and its kernel module", "nvidia-smi"),
        (Driver(status=999), CUDA, True, "finds no device (cuInit gave 999)", "nvidia-smi"),
        (Driver(("Tesla V100", 7), version=11040), CUDA, True, "too old: it speaks CUDA 11.4, not 12.0", "Upgrade"),
        (
            Driver(("NVIDIA H100", 9), version=12080), CUDA, True,
            "it speaks CUDA 12.8, and torch 2.11.0+cu130 was built with CUDA 13.0",
            "Upgrade the driver to one for CUDA 13.0, or install a torch built with CUDA 12.",
        ),
        (Driver(("NVIDIA H100", 9)), CUDA, False, "Triton is not installed", "Install torch's CUDA build"),
        (Driver(("NVIDIA H100", 9)), None, True, "torch is not installed", "Install torch's CUDA build"),
        (Driver(("NVIDIA H100", 9)), TorchBuild("2.13.0+cpu"), True, "torch 2.13.0+cpu is a CPU build", "CUDA build"),
        (
            Driver(("NVIDIA H100", 9)), TorchBuild("2.13.0+rocm7.1", hip="7.1"), True,
            "is a ROCm build, not a CUDA one", "CUDA build",
        ),
        (Driver(("Tesla T4", 7)), CUDA, True, "Tesla T4: older than compute capability 8.0", "8.0 or newer"),
        (Driver(), CUDA, True, "the driver lists no device", "CUDA_VISIBLE_DEVICES"),
    ],
    ids=["no driver", "no init", "two drivers", "unknown status", "old driver", "old for this torch", "no triton",
         "no torch", "cpu torch", "rocm torch", "old card", "none"],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, build: TorchBuild | None, triton: bool, reason: str,
    remedy: str,
) -> None:  # fmt: skip
    found = ask(monkeypatch, driver, build, triton)
    assert not found.ok and reason in found.reason and remedy in found.remedy


def test_the_machine_without_a_gpu_says_so_through_the_front_door() -> None:
    from dougong_cuda import dougong_backends

    (spec,) = dougong_backends()
    found = spec.probe()
    assert found.ok or found.reason
