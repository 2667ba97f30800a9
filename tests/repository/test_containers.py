"""The images and compose files: linted, of one kind, and the CPU image's install steps replayed without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
VENDORS = ("cpu", "cuda", "rocm", "xpu", "ascend")
COMPOSE = [*sorted(DOCKER.glob("compose.*.yaml")), DOCKER / "fleet" / "compose.yaml"]


def instructions(vendor: str) -> list[tuple[str, str]]:
    """(instruction, its text in one line) of a Dockerfile, comments left out."""
    lines = [line for line in (DOCKER / f"{vendor}.Dockerfile").read_text("utf-8").splitlines() if line[:1] != "#"]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def last_stage(vendor: str) -> list[tuple[str, str]]:
    steps = instructions(vendor)
    return steps[max(at for at, (name, _) in enumerate(steps) if name == "FROM") :]


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.skipif(hadolint() is None, reason="hadolint is not installed (it is x86-64 only)")
def test_hadolint(vendor: str) -> None:
    command = [str(hadolint()), "--no-color", "--config", str(DOCKER / ".hadolint.yaml")]
    done = subprocess.run([*command, str(DOCKER / f"{vendor}.Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_vendor_has_an_image_and_a_compose_file() -> None:
    assert {path.stem for path in DOCKER.glob("*.Dockerfile")} == set(VENDORS)
    assert {path.name.split(".")[1] for path in DOCKER.glob("compose.*.yaml")} == set(VENDORS)


@pytest.mark.parametrize("vendor", VENDORS)
def test_images_are_of_one_kind(vendor: str) -> None:
    steps, final = instructions(vendor), last_stage(vendor)
    base = next(rest for name, rest in steps if name == "ARG" and rest.startswith("BASE="))
    assert ":" in base and not base.endswith(":latest")
    assert [name for name, _ in steps].count("FROM") == 2, "what builds is not what runs"
    assert "ADD" not in {name for name, _ in steps}
    (user,) = [rest for name, rest in final if name == "USER"]
    assert int(user) >= 1000
    order = [name for name, _ in final]
    assert order.index("USER") < order.index("ENTRYPOINT")
    (check,) = [rest for name, rest in final if name == "HEALTHCHECK"]
    assert "/health" in check and ":8000" in check and "--start-period" in check
    (entry,) = [rest for name, rest in final if name == "ENTRYPOINT"]
    words = json.loads(entry)  # the form without a shell of docker's: signals reach the server
    assert "dougong serve --host 0.0.0.0 --port 8000" in " ".join(words)
    assert vendor == "ascend" or words[0] == "dougong"
    for name, rest in steps:
        if name == "RUN" and "pip install" in rest:
            assert rest.count("pip install") == rest.count("--no-cache-dir")
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
    assert f"DOUGONG_BACKEND={vendor}" in " ".join(rest for name, rest in final if name == "ENV")


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_is_copied_exists_and_is_let_through(vendor: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    for name, rest in instructions(vendor):
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in rules


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.relative_to(DOCKER).as_posix())
def test_compose_files(path: Path) -> None:
    document: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    fleet = path.parent.name == "fleet"
    assert set(document["services"]) == ({"front", *VENDORS} if fleet else {path.name.split(".")[1]})
    for name, service in document["services"].items():
        assert service["read_only"] is True and "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service and service.get("network_mode") != "host"
        if name == "front":
            continue
        assert service["cap_drop"] == ["ALL"] and service["image"] == f"dougong:{name}"
        build = service["build"]
        assert (path.parent / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).name == f"{name}.Dockerfile"
        assert any(str(volume).startswith("models:") for volume in service["volumes"])
        assert service.get("profiles") == ([name] if fleet else None)
        env = " ".join(rest for word, rest in last_stage(name) if word == "ENV")
        compiled = re.findall(r"TRITON_CACHE_DIR=(\S+)", env)
        writable = [mount for mount in service["tmpfs"] if mount.endswith(":exec")]
        assert writable == [f"{place}:exec" for place in compiled], "shared libraries are loaded from there alone"
        # The group's number is the host's, its name is not in every image.
        assert (name in ("rocm", "xpu")) == any("RENDER_GID" in group for group in service.get("group_add", ()))
        for place in re.findall(r"ASCEND_\w+_PATH=(\S+)", env):
            assert place in service["tmpfs"], "the root is read-only"
    assert "models" in document["volumes"]


def test_the_fleet_s_front_knows_every_server() -> None:
    text = (DOCKER / "fleet" / "Caddyfile").read_text("utf-8")
    assert all(f"{vendor}:8000" in text for vendor in VENDORS) and "health_uri /health" in text


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_the_cpu_image_s_steps_work_in_a_clean_folder(tmp_path: Path) -> None:
    """The build stage's COPY and RUN lines, with the image's root in a folder; pip asks the index it is set up for."""
    root, source = tmp_path / "root", tmp_path / "root" / "src"
    source.mkdir(parents=True)
    arguments = {"TORCH_INDEX": "", "TORCH": ""}
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"HOME": str(tmp_path)}
    for name, rest in instructions("cpu"):
        if name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for one in sources:
                copy(ROOT / one, source / one if target != "./" else source / Path(one).name)
        elif name == "RUN" and "apt-get" not in rest and "useradd" not in rest:
            command = rest.replace("/opt/dougong", str(root / "opt/dougong"))
            command = command.replace("python3 -m venv", f"{sys.executable} -m venv")
            # Torch from the index that this machine has; its version as the image asks for it.
            command = command.replace('--index-url "$TORCH_INDEX" ', "")
            (root / "opt").mkdir(exist_ok=True)
            done = subprocess.run(
                ["sh", "-ec", command], cwd=source, env=env | arguments, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    doctor = [str(root / "opt/dougong/bin/dougong"), "doctor", "--json"]
    done = subprocess.run(doctor, cwd=root, env=env, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["chosen"]["backend"] == "cpu", done.stdout[-2000:] + done.stderr
    served = subprocess.run(
        [doctor[0], "serve", "--help"], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert served.returncode == 0 and "--port" in served.stdout


def copy(source: Path, target: Path) -> None:
    """What .dockerignore lets through of it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "tests")
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignored)
    else:
        shutil.copy2(source, target)
