"""GGUF files unpacked once into folders that transformers reads: config, tokenizer, chat template, safetensors.

Weights are stored in float32, the only plain format that holds every widened block exactly, so that a model
loaded from the folder has the very weights of the GGUF file. A second start maps the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dougong.errors import ModelLoadError
from dougong.models.loading.gguf import GGUFWeights
from dougong.models.loading.gguf_tokenizer import write_tokenizer
from dougong.models.weights import WeightSpec

__all__ = ["cache_root", "file_key", "is_unpacked", "unpack_gguf"]

#: Part of the key: raised whenever the folder's content would be made differently.
_FORMAT = 1
_MARK = "dougong.json"
_SAMPLES = 256
_SAMPLE_BYTES = 16384


def cache_root() -> Path:
    """``$DOUGONG_CACHE``, else ``dougong`` in the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    given = os.environ.get("DOUGONG_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dougong"


def file_key(path: Path) -> str:
    """A digest of a file's size and of samples spread over it: another model, quantisation or conversion changes it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(f"{_FORMAT}:{size}".encode(), digest_size=12)
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_unpacked(folder: Path) -> bool:
    """Whether ``folder`` was made here."""
    return (folder / _MARK).is_file()


def unpack_gguf(path: Path, *, weights: bool = True) -> Path:
    """The folder of ``path``, made if it is not there. Safe among processes: one makes it, the others wait.

    ``weights`` False leaves out model.safetensors (a file too large to keep twice).

    Raises:
        ModelLoadError: the GGUF file cannot be read, or the cache cannot be written.
    """
    name = f"{path.stem}-{file_key(path)}" + ("" if weights else "-config")
    root = cache_root() / "models"
    folder = root / name
    if is_unpacked(folder):
        return folder
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not is_unpacked(folder):
                _make(path, folder, weights)
    except OSError as error:
        raise ModelLoadError(
            f"cannot unpack {path} into {folder}: {error}. Make room there, or set DOUGONG_CACHE to another directory."
        ) from error
    return folder


def _make(path: Path, folder: Path, weights: bool) -> None:
    source = GGUFWeights(path)
    config = source.config()
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_tokenizer(path, source.file.metadata, building)
        _write_json(building / "config.json", config)
        generation: dict[str, Any] = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
        }
        _write_json(building / "generation_config.json", {"_from_model_config": True, **generation})
        if weights:
            _write_weights(source, building / "model.safetensors")
        _write_json(building / _MARK, {"source": str(path), "format": _FORMAT})
        building.chmod(0o755)
        # A folder without its mark is a leaving of a process that was killed between rename and here: never ours.
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_weights(source: GGUFWeights, target: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, shape in source.shapes().items():
        tensors[name] = source.read(WeightSpec(name, tuple(shape))).float().contiguous()
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(0o644)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
