"""`dougong models`: both hubs' caches as they lie on the disk, and what a pull says when it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from typer.testing import CliRunner, Result

from dougong.cli.model_cache import Source, pull_model
from dougong.cli.models import models_app, size_text
from dougong.errors import ConfigError, ModelLoadError
from dougong.models.loading.source import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in each cache."""
    hub = tmp_path / "hub"
    snapshot = hub / "models--org--small" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = hub / "models--org--small" / "blobs"
    blobs.mkdir()
    (blobs / "aa").write_bytes(b"x" * 3000)
    (snapshot / "model.safetensors").symlink_to(blobs / "aa")
    refs = hub / "models--org--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    scope = tmp_path / "scope" / "models" / "org" / "two___five"
    scope.mkdir(parents=True)
    (scope / "config.json").write_text("{}")
    unpacked = tmp_path / "dougong" / "models" / "SmolLM-0123456789ab"
    unpacked.mkdir(parents=True)
    (unpacked / "dougong.json").write_text(json.dumps({"source": "/somewhere/SmolLM.Q4_1.gguf"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "dougong"))
    monkeypatch.delenv("DOUGONG_MODEL_SOURCE", raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(models_app, arguments)


def listed() -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads(run("list", "--json").stdout)}


def test_list_names_what_is_there_and_its_size() -> None:
    found = listed()
    assert found["org/small"]["source"] == "huggingface" and found["org/small"]["size"] == 3000
    assert found["org/small"]["revision"] == COMMIT
    assert found["org/two.five"]["source"] == "modelscope" and found["org/two.five"]["size"] == 2
    assert found["SmolLM.Q4_1.gguf (456789ab)"]["source"] == "unpacked"
    table = run("list").stdout
    assert "org/small" in table and "2.9 KiB" in table and "0123456789ab" in table


def test_rm_asks_and_frees(caches: Path) -> None:
    refused = CliRunner().invoke(models_app, ["rm", "org/small"], input="n\n")
    assert refused.exit_code == 1 and "org/small" in listed()
    assert json.loads(run("rm", "org/small", "--yes", "--json").stdout) == {"removed": "org/small", "freed": 3000}
    assert run("rm", "org/two.five", "-y").exit_code == 0
    assert run("rm", "SmolLM.Q4_1.gguf (456789ab)", "-y").exit_code == 0
    assert not {"org/small", "org/two.five", "SmolLM.Q4_1.gguf (456789ab)"} & set(listed())
    assert not (caches / "scope" / "models" / "org" / "two___five").exists()
    missing = run("rm", "org/small", "-y")
    assert isinstance(missing.exception, ConfigError) and "dougong models list" in str(missing.exception)


def test_pull_tells_where_and_how_to_serve(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(caches / "hub" / "models--org--small" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    shown = run("pull", "org/small", "--revision", "main").stdout
    assert "2.9 KiB" in shown and "dougong serve org/small" in shown
    assert asked["revision"] == "main" and "*.safetensors" in asked["allow_patterns"]
    assert "consolidated*" in asked["ignore_patterns"]  # Mistral's files hold the weights twice
    pulled = json.loads(run("pull", "org/small", "--all-files", "--json").stdout)
    assert pulled["revision"] == COMMIT and asked["allow_patterns"] is None
    assert asked["ignore_patterns"] is None


def response() -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=404)


FAILURES: list[tuple[Any, str]] = [
    (lambda: errors.GatedRepoError("gated", response=response()), "accept its terms on the hub, then set HF_TOKEN"),
    (lambda: errors.RepositoryNotFoundError("none", response=response()), "there is no model 'org/small' at https://"),
    (lambda: errors.RevisionNotFoundError("none", response=response()), "has no revision 'dev'"),
    (lambda: OSError("no route to host"), "no route to host. Is there a network"),
]


@pytest.mark.parametrize(("failure", "message"), FAILURES, ids=[message[:20] for _, message in FAILURES])
def test_a_pull_that_fails_says_what_to_change(monkeypatch: pytest.MonkeyPatch, failure: Any, message: str) -> None:
    def download(name: str, **options: Any) -> str:
        raise failure()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelLoadError, match=message):
        pull_model("org/small", source=None, revision="dev")


def test_a_pull_names_the_mirror_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")

    def download(name: str, **options: Any) -> str:
        raise OSError("refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelLoadError, match=r"from https://mirror\.example: OSError: refused"):
        pull_model("org/small", source=None, revision=None)


def test_offline_is_said_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE is set"):
        pull_model("org/small", source=None, revision=None)


def test_modelscope(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install modelscope"):
        pull_model("org/two.five", source=Source.MODELSCOPE, revision=None)
    with pytest.raises(ModelLoadError, match="pip install modelscope"):
        resolve_model("modelscope:org/two.five")
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(caches / "scope" / "models" / "org" / "two___five")

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=download))
    pulled = pull_model("modelscope:org/two.five", source=None, revision=None)
    assert pulled.source == "modelscope" and pulled.serve_as == "modelscope:org/two.five"
    assert resolve_model(pulled.serve_as, weights=False).folder == Path(pulled.path)
    monkeypatch.setenv("DOUGONG_MODEL_SOURCE", "modelscope")
    assert pull_model("org/two.five", source=None, revision=None).size == 2
    assert asked == ["org/two.five"] * 3
    monkeypatch.setenv("DOUGONG_MODEL_SOURCE", "elsewhere")
    with pytest.raises(ConfigError, match="huggingface, modelscope"):
        pull_model("org/two.five", source=None, revision=None)


@pytest.mark.parametrize("name", ["a/b/c", "./folder", "org/", "~/model"])
def test_what_is_no_hub_id(name: str) -> None:
    with pytest.raises(ConfigError, match="expected ORG/NAME"):
        pull_model(name, source=None, revision=None)


def test_a_packaged_model_is_neither_pulled_nor_removed() -> None:
    with pytest.raises(ConfigError, match="pip install"):
        pull_model("smollm2-135m", source=None, revision=None)
    if "smollm2-135m" in listed():
        assert "uninstall that with pip" in str(run("rm", "smollm2-135m", "-y").exception)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (98_700_000, "94.1 MiB"), (1 << 41, "2.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
