"""Where models lie on this machine: packaged ones, two hubs' caches, and unpacked GGUF files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from dougong.errors import ConfigError, ModelLoadError

__all__ = ["CachedModel", "Source", "cached_models", "pull_model", "remove_model"]


class Source(str, Enum):
    """The hubs that models are fetched from."""

    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine. ``size`` in bytes, ``last_used`` in seconds since the epoch (0: not known)."""

    name: str
    source: str
    path: str
    size: int
    revision: str = ""
    last_used: float = 0.0

    @property
    def serve_as(self) -> str:
        """What `dougong serve` finds it by."""
        if self.source == Source.MODELSCOPE.value:
            return f"modelscope:{self.name}"
        return self.path if self.source == "unpacked" else self.name

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cached_models() -> list[CachedModel]:
    """All of them, by source and name."""
    return [*_packaged(), *_huggingface(), *_modelscope(), *_unpacked()]


def pull_model(name: str, *, source: Source | None, revision: str | None, all_files: bool = False) -> CachedModel:
    """Fetch ``name``.

    Raises:
        ModelLoadError: it cannot be had; the message says what to change.
        ConfigError: it is no id, or the hub's client is not installed.
    """
    from dougong.models.loading.source import ALIASES, MODELSCOPE, WANTED

    if name in ALIASES:
        raise ConfigError(f"{name!r} comes as a package, not from a hub: {ALIASES[name][2]}")
    if name.startswith(MODELSCOPE):
        name, source = name.removeprefix(MODELSCOPE).lstrip("/"), Source.MODELSCOPE
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~")):
        raise ConfigError(f"{name!r} is no hub id: expected ORG/NAME, e.g. HuggingFaceTB/SmolLM2-135M-Instruct.")
    patterns = None if all_files else [*WANTED, "*.safetensors"]
    if (source or _default_source()) is Source.MODELSCOPE:
        return _pull_modelscope(name, revision, patterns)
    return _pull_huggingface(name, revision, patterns)


def remove_model(model: CachedModel) -> int:
    """Delete it; gives back the bytes that are free again.

    Raises:
        ConfigError: it belongs to a package.
    """
    if model.source == "package":
        raise ConfigError(f"{model.name!r} is part of an installed package: uninstall that with pip.")
    if model.source == Source.HUGGINGFACE.value:
        from huggingface_hub import constants, scan_cache_dir

        info = scan_cache_dir(constants.HF_HUB_CACHE)
        revisions = [
            one.commit_hash for repo in info.repos if str(repo.repo_path) == model.path for one in repo.revisions
        ]
        strategy = info.delete_revisions(*revisions)
        freed = int(strategy.expected_freed_size)
        strategy.execute()
        return freed
    shutil.rmtree(model.path)
    Path(f"{model.path}.lock").unlink(missing_ok=True)
    return model.size


def _default_source() -> Source:
    given = os.environ.get("DOUGONG_MODEL_SOURCE", Source.HUGGINGFACE.value)
    try:
        return Source(given)
    except ValueError as error:
        allowed = ", ".join(one.value for one in Source)
        raise ConfigError(f"DOUGONG_MODEL_SOURCE={given!r}: allowed is {allowed}.") from error


# -- what is here -------------------------------------------------------------------------------------------


def _packaged() -> Iterator[CachedModel]:
    from dougong.models.loading.source import ALIASES

    for alias, (package, file, _) in ALIASES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / file
            if path.is_file():
                yield CachedModel(alias, "package", str(path), path.stat().st_size, last_used=path.stat().st_atime)


def _huggingface() -> Iterator[CachedModel]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        info = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return
    for repo in sorted(info.repos, key=lambda one: one.repo_id):
        if repo.repo_type == "model":
            newest = max(repo.revisions, key=lambda one: one.last_modified, default=None)
            yield CachedModel(
                repo.repo_id, Source.HUGGINGFACE.value, str(repo.repo_path), repo.size_on_disk,
                newest.commit_hash if newest else "", repo.last_accessed or 0.0,
            )  # fmt: skip


def _modelscope_root() -> Path:
    given = os.environ.get("MODELSCOPE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "modelscope" / "hub"


def _modelscope() -> Iterator[CachedModel]:
    for folder in sorted((_modelscope_root() / "models").glob("*/*/")):
        if folder.is_symlink() or not (folder / "config.json").is_file():
            continue  # its client links NAME with a dot to where it lies
        name = f"{folder.parent.name}/{folder.name.replace('___', '.')}"
        yield CachedModel(name, Source.MODELSCOPE.value, str(folder), _size(folder), last_used=folder.stat().st_mtime)


def _unpacked() -> Iterator[CachedModel]:
    from dougong.models.loading.cache import cache_root

    for folder in sorted((cache_root() / "models").glob("*/")):
        mark = folder / "dougong.json"
        if mark.is_file():
            source = json.loads(mark.read_text(encoding="utf-8")).get("source", "")
            name = f"{Path(source).name} ({folder.name.removesuffix('-config')[-8:]})"
            yield CachedModel(name, "unpacked", str(folder), _size(folder), last_used=folder.stat().st_mtime)


def _size(folder: Path) -> int:
    """Bytes of the folder's own files; what a link leads to is not its own."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# -- fetching -----------------------------------------------------------------------------------------------


def _pull_huggingface(name: str, revision: str | None, patterns: list[str] | None) -> CachedModel:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from dougong.models.loading.source import UNWANTED

    if constants.HF_HUB_OFFLINE:
        raise ModelLoadError(f"{name!r} cannot be fetched: HF_HUB_OFFLINE is set. Unset it, or copy a folder here.")
    try:
        unwanted = None if patterns is None else [*UNWANTED]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=unwanted))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{name!r} is gated: accept its terms on the hub, then set HF_TOKEN to a token of that account."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{name!r} has no revision {revision!r}: name a branch, tag or commit of it.") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"there is no model {name!r} at {constants.ENDPOINT}, or it is private (HF_TOKEN). Look at its spelling."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ModelLoadError(f"{name!r} cannot be fetched: HF_HUB_OFFLINE is set. Unset it.") from error
    except Exception as error:  # every kind of failure between here and the hub
        raise ModelLoadError(
            f"{name!r} could not be fetched from {constants.ENDPOINT}: {_first_line(error)}. Is there a network? "
            "HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy; --source modelscope asks the other hub. Without a "
            "network, copy the model's folder here and name it."
        ) from error
    # A snapshot lies at <repository>/snapshots/<commit>.
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CachedModel(name, Source.HUGGINGFACE.value, str(folder), size, folder.name)


def _pull_modelscope(name: str, revision: str | None, patterns: list[str] | None) -> CachedModel:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ConfigError(f"ModelScope's client is not installed ({error}): pip install modelscope") from error
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # its client raises many kinds
        raise ModelLoadError(
            f"{name!r} could not be fetched from ModelScope: {_first_line(error)}. Is it the id there, and is there a "
            "network? --source huggingface asks the other hub."
        ) from error
    return CachedModel(name, Source.MODELSCOPE.value, str(folder), _size(folder), revision or "")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
