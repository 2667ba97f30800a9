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

from dougong.errors import DougongError, ModelLoadError
from dougong.models.loading.gguf import GGUFWeights
from dougong.models.loading.gguf_tokenizer import write_tokenizer
from dougong.models.weights import WeightSpec

__all__ = ["cache_root", "file_key", "is_unpacked", "unpack_gguf"]

#: Part of the key: raised whenever the folder's content would be made differently.
_FORMAT = 2
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

    ``weights`` False links to the file in place of model.safetensors (one too large to keep twice).

    Raises:
        ModelLoadError: the GGUF file cannot be read, or the cache cannot be written.
    """
    name = f"{path.stem}-{file_key(path)}" + ("" if weights else "-config")
    root = cache_root() / "models"
    folder = root / name
    try:
        if not is_unpacked(folder):
            from filelock import FileLock

            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f"{name}.lock"):
                if not is_unpacked(folder):
                    _make(path, folder, weights)
        if not weights:
            _link(path, folder / f"{path.stem}.gguf")
    except OSError as error:
        raise ModelLoadError(
            f"cannot unpack {path} into {folder}: {error}. Make room there, or set DOUGONG_CACHE to another directory."
        ) from error
    return folder


def _make(path: Path, folder: Path, weights: bool) -> None:
    source = GGUFWeights(path)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        try:
            config = source.config()
            write_tokenizer(path, source.file.metadata, building)
        except (DougongError, OSError):
            raise
        except Exception as error:  # values of any kind, where another belongs
            raise ModelLoadError(
                f"{path} is corrupt: its metadata makes no sense ({type(error).__name__}: {error}). Fetch it again."
            ) from error
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


def _link(path: Path, link: Path) -> None:
    """``link`` leads to ``path``, which may have been moved since."""
    if link.resolve() == path.resolve():
        return
    new = link.with_name(f".{link.name}-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(path.resolve())
    new.replace(link)


def _write_weights(source: GGUFWeights, target: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, shape in source.shapes().items():
        tensors[name] = source.read(WeightSpec(name, tuple(shape))).float().contiguous()
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(0o644)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
