"""The distributions of this tree agree with one another: versions, ABI, extras, workspace, import rules."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
VENDORS = ("cpu", "cuda", "rocm", "xpu", "ascend")
#: Bridges into other frameworks bring the core nothing; they register where their host looks.
BRIDGES = ("plugins/ray", "plugins/sglang", "plugins/transformers", "plugins/vllm")


def read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


ROOT_PROJECT = read(ROOT / "pyproject.toml")
#: Folder to pyproject of every distribution beside the root.
OTHERS = {
    path.parent.relative_to(ROOT).as_posix(): read(path)
    for pattern in ("kernels", "compat_tests", "backends/*", "plugins/*")
    for path in sorted(ROOT.glob(f"{pattern}/pyproject.toml"))
}


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match.group().lower()


def name_of(project: dict[str, Any]) -> str:
    return str(project["project"]["name"])


def package_of(folder: str) -> str:
    return name_of(OTHERS[folder]).replace("-", "_")


@pytest.mark.parametrize("folder", OTHERS)
def test_name_and_package_follow_the_folder(folder: str) -> None:
    last = {"kernels": "kernels", "compat_tests": "compat"}.get(folder, folder.rpartition("/")[2])
    assert name_of(OTHERS[folder]) == f"dougong-{last}"
    package = ROOT / folder / f"dougong_{last}"
    assert (package / "__init__.py").is_file(), f"{package} is the package of {folder}; no src folder"


@pytest.mark.parametrize("folder", OTHERS)
def test_metadata_is_of_one_kind(folder: str) -> None:
    project = OTHERS[folder]["project"]
    assert project["requires-python"] == ROOT_PROJECT["project"]["requires-python"]
    assert project["license"] == "Apache-2.0"
    assert project.get("description")
    # The licence asks that a copy goes with every wheel.
    assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("folder", OTHERS)
def test_no_equality_pins_between_distributions(folder: str) -> None:
    ours = [text for text in OTHERS[folder]["project"].get("dependencies", []) if text.startswith("dougong")]
    assert ours, f"{folder} stands on the core and must say so"
    assert not [text for text in ours if "==" in text], "versions are kept in step by the ABI number"


@pytest.mark.parametrize("folder", OTHERS)
def test_build_needs_no_torch(folder: str) -> None:
    # An isolated build environment would fetch a second torch, gigabytes of it.
    requires = {requirement_name(text) for text in OTHERS[folder]["build-system"]["requires"]}
    assert "torch" not in requires


@pytest.mark.parametrize(
    "folder",
    [folder for folder in OTHERS if folder.startswith(("backends/", "plugins/")) and folder not in BRIDGES],
)
def test_plugins_register_in_the_group(folder: str) -> None:
    points = OTHERS[folder]["project"].get("entry-points", {}).get("dougong", {})
    assert points, f"{folder} registers no entry point in group 'dougong'"
    assert all(target.partition(":")[0].startswith(package_of(folder)) for target in points.values())


def test_extras_name_every_vendor() -> None:
    extras = ROOT_PROJECT["project"]["optional-dependencies"]
    for vendor in VENDORS:
        assert [requirement_name(text) for text in extras[vendor]] == [f"dougong-{vendor}"]
    assert {"sim", "compat", "serve", "dev"} <= set(extras)


def test_workspace_holds_every_distribution() -> None:
    uv = ROOT_PROJECT["tool"]["uv"]
    assert set(uv["workspace"]["members"]) == set(OTHERS)
    here = {name_of(project) for project in OTHERS.values()}
    assert set(uv["sources"]) == {"dougong", *here}
    assert all(source == {"workspace": True} for source in uv["sources"].values())
    extras = ROOT_PROJECT["project"]["optional-dependencies"].values()
    named = {requirement_name(text) for extra in extras for text in extra}
    missing = {name for name in named if name.startswith("dougong-")} - here
    assert set(uv.get("exclude-dependencies", [])) == missing


def test_import_rules_cover_every_distribution() -> None:
    packages = {package_of(folder) for folder in OTHERS}
    rules = ROOT_PROJECT["tool"]["importlinter"]
    assert set(rules["root_packages"]) == {"dougong", *packages}
    contracts = {contract["id"]: contract for contract in rules["contracts"]}
    assert packages <= set(contracts["core-knows-no-vendor"]["forbidden_modules"])
    backends = {package_of(folder) for folder in OTHERS if folder.startswith("backends/")}
    assert backends <= set(contracts["backends-see-the-contract"]["source_modules"])


def test_floors_cover_every_package_of_the_core() -> None:
    contracts = ROOT_PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in contracts if contract["id"] == "floors")["layers"]
    named = {part.strip(" ()").removeprefix("dougong.") for layer in layers for part in layer.split("|")}
    here = {
        path.stem
        for path in (ROOT / "core" / "dougong").iterdir()
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and not path.stem.startswith("__"))
    }
    assert here <= named, f"packages without a floor: {sorted(here - named)}"


def test_version_is_stated_once() -> None:
    import importlib.metadata

    import dougong

    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", dougong.__version__)
    assert ROOT_PROJECT["project"]["dynamic"] == ["version"]
    assert importlib.metadata.version("dougong") == dougong.__version__


def test_plugins_of_this_tree_speak_this_abi() -> None:
    from dougong.plugins import ABI, load_plugins

    plugins = load_plugins()
    specs = [spec for _, spec in plugins.records("dougong_backends")]
    assert specs, "no backend of this tree registered itself"
    wrong = {spec.name: spec.abi for spec in specs if tuple(spec.abi) != tuple(ABI)}
    assert not wrong, f"the core's ABI is {ABI}; these name another: {wrong}"


def test_constraints_allow_what_the_projects_ask_for() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower()] = next(iter(pin.specifier)).version
    assert pins["torch"] == "2.13.0"
    projects = [ROOT_PROJECT, *OTHERS.values()]
    for project in projects:
        extras = project["project"].get("optional-dependencies", {}).values()
        for text in [*project["project"].get("dependencies", []), *(t for extra in extras for t in extra)]:
            wanted = Requirement(text)
            pinned = pins.get(wanted.name.lower())
            if pinned is not None:
                assert wanted.specifier.contains(pinned, prereleases=True), f"{text} against =={pinned}"
