"""The probe names what is missing and what to do, in the order in which one would mend it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dougong_kernels.torch_build import TorchBuild
from dougong_rocm.probe import probe, seen_targets
from dougong_rocm.targets import COMPILED, gfx_target

ROCM = TorchBuild("2.13.0+rocm7.1", hip="7.1.52802")


def node(root: Path, index: int, version: int, simds: int = 400) -> None:
    folder = root / "sys/class/kfd/kfd/topology/nodes" / str(index)
    folder.mkdir(parents=True)
    (folder / "properties").write_text(f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {version}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A CPU and two MI300."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    node(tmp_path, 0, 0, simds=0)
    node(tmp_path, 1, 90402)
    node(tmp_path, 10, 90402)
    return tmp_path


def test_all_is_there(machine: Path) -> None:
    found = probe(machine, lambda: ROCM, lambda: True)
    assert found.ok and found.devices == ("gfx942", "gfx942") and "7.1.52802" in found.reason


@pytest.mark.parametrize(
    ("version", "name"),
    [(90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (110000, "gfx1100"), (110501, "gfx1151"),
     (120001, "gfx1201"), (90600, "gfx960")],
)  # fmt: skip
def test_names_of_targets(tmp_path: Path, version: int, name: str) -> None:
    node(tmp_path, 0, version)
    assert seen_targets(tmp_path) == [name]


@pytest.mark.parametrize(
    ("build", "triton", "reason", "remedy"),
    [
        (None, True, "torch is not installed", "ROCm build"),
        (TorchBuild("2.13.0", cuda="13.0"), True, "is a CUDA build, not a ROCm one", "ROCm build"),
        (TorchBuild("2.13.0+cpu"), True, "is a CPU build, not a ROCm one", "ROCm build"),
        (TorchBuild("2.8.0+rocm6.2", hip="6.2.1"), True, "built with ROCm 6.2.1: 6.3 is the oldest", "ROCm build"),
        (ROCM, False, "Triton is not installed", "Triton of this torch"),
    ],
)
def test_software(machine: Path, build: TorchBuild | None, triton: bool, reason: str, remedy: str) -> None:
    found = probe(machine, lambda: build, lambda: triton)
    assert not found.ok and reason in found.reason and remedy in found.remedy


def test_no_driver_and_no_permission(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be opened" in probe(machine, lambda: ROCM).reason
    assert "render" in probe(machine, lambda: ROCM).remedy
    (machine / "dev/kfd").unlink()
    found = probe(machine, lambda: ROCM)
    assert "no AMD GPU driver" in found.reason and "--device=/dev/kfd" in found.remedy


def test_devices_that_no_kernel_is_compiled_for(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert "lists no GPU" in probe(tmp_path, lambda: ROCM).reason
    node(tmp_path, 1, 90006)
    found = probe(tmp_path, lambda: ROCM)
    assert not found.ok and "gfx906" in found.reason and "gfx90a" in found.reason and "CDNA 2" in found.remedy


def test_every_compiled_target_is_known() -> None:
    from dougong_kernels.compile.targets import TARGETS

    assert set(COMPILED) == {name for name, target in TARGETS.items() if target.backend == "hip"}
    for name in COMPILED:
        target = gfx_target(name + ":sramecc+:xnack-")
        assert target is not None and target.name == target.like == name and target.wave == TARGETS[name].wave
        assert (target.fp8 == "ocp") == (TARGETS[name].native_fp8 == "fp8e4nv")
    assert gfx_target("gfx1151").like == "gfx1100"  # type: ignore[union-attr]
    assert gfx_target("gfx1030") is None and gfx_target("gfx908") is None
