"""A model's name by its content: equal ones compute the same KV."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

from dougong.models.loading.cache import file_key, is_unpacked

__all__ = ["model_digest"]

#: Keys of config.json that say nothing about the model.
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def model_digest(folder: Path, *, dummy: str | None = None) -> str:
    """A digest of config and weights in ``folder``: of its files' sizes and of samples spread over each, so that large
    models cost no more than a second. ``dummy``: what decides random weights, where there are no others: the seed
    and the device that draws them.
    """
    digest = blake2b(digest_size=16)
    if is_unpacked(folder):  # its name holds the digest of the GGUF file
        digest.update(folder.name.removesuffix("-config").encode())
    else:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        plain = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(json.dumps(plain, sort_keys=True).encode())
        if dummy is None:
            for file in sorted(folder.glob("*.safetensors")):
                digest.update(file_key(file).encode())
    if dummy is not None:
        digest.update(f"random weights: {dummy}".encode())
    return digest.hexdigest()
