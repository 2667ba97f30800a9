"""The probe names what is missing and what to do, in the order in which one would mend it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dougong_ascend.probe import probe

# The package's attribute of this name is the function.
module = sys.modules["dougong_ascend.probe"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root directory with two devices and CANN; torch and torch-npu 2.13."""
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / name).touch()
    arch = tmp_path / "usr/local/Ascend/ascend-toolkit/latest/x86_64-linux"
    arch.mkdir(parents=True)
    (arch / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    install(monkeypatch, {"torch": "2.13.0+cpu", "torch-npu": "2.13.0.post2"})
    return tmp_path


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise module.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(module, "version", version)


def test_all_is_there(machine: Path) -> None:
    found = probe(machine, {})
    assert found.ok and found.devices == ("npu:0", "npu:1")
    assert "2.13.0" in found.reason and "8.5.0" in found.reason


def test_no_device(machine: Path) -> None:
    for path in (machine / "dev").glob("davinci[0-9]"):
        path.unlink()  # the manager's file alone is no device
    found = probe(machine, {})
    assert not found.ok and "no Ascend device" in found.reason and "driver" in found.remedy


@pytest.mark.parametrize(
    ("versions", "reason", "remedy"),
    [
        ({"torch": "2.13.0"}, "torch-npu is not installed", "torch-npu==2.13.*"),
        ({}, "torch is not installed", "torch"),
        ({"torch": "2.12.1", "torch-npu": "2.13.0"}, "is for torch 2.13; torch 2.12.1", "torch-npu==2.12.*"),
        ({"torch": "2.7.0", "torch-npu": "2.7.1"}, "too old: 2.8", "Upgrade torch"),
    ],
)
def test_sdk(
    machine: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], reason: str, remedy: str
) -> None:
    install(monkeypatch, versions)
    found = probe(machine, {})
    assert not found.ok and reason in found.reason and remedy in found.remedy


def test_cann(machine: Path) -> None:
    missing = probe(machine, {"ASCEND_HOME_PATH": str(machine / "nowhere")})
    assert not missing.ok and "CANN was not found" in missing.reason and "set_env.sh" in missing.remedy
    old = machine / "old"
    old.mkdir()
    (old / "version.cfg").write_text("# version file\nversion=[7.0.RC1]\n".replace("7.0.RC1", "7.0.1"))
    found = probe(machine, {"ASCEND_TOOLKIT_HOME": str(old)})
    assert not found.ok and "CANN 7.0.1 is too old" in found.reason


def test_this_machine_answers() -> None:
    assert isinstance(probe().ok, bool)
