"""Weights from safetensors files, mapped into memory: only the rows and columns asked for are touched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dougong.errors import ModelLoadError
from dougong.models.weights import ALL, WeightSource, WeightSpec

__all__ = ["SafetensorsWeights", "find_safetensors"]

_INDEX = "model.safetensors.index.json"


def find_safetensors(folder: Path) -> list[Path]:
    """The files of one model, by its index where there is one.

    Raises:
        ModelLoadError: there are none, or the index names a file that is not there, or only pickled weights are.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index} is corrupt ({error}); fetch it again.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelLoadError(
                f"{index} names {len(names)} files, of which {len(missing)} are not there ({', '.join(missing[:4])}); "
                "the download is incomplete."
            )
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    found = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")))
    if pickled:
        raise ModelLoadError(
            f"{folder} holds pickled weights only ({', '.join(pickled[:3])}). A pickle can run any code when it is "
            "read, so they are not loaded; convert them once: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)."
        )
    raise ModelLoadError(
        f"{folder} holds a config but no weights: no *.safetensors and no *.gguf. Add them, or ask for random ones "
        "with load_format='dummy'."
    )


class SafetensorsWeights(WeightSource):
    """All tensors of the given files.

    Raises:
        ModelLoadError: a file is truncated or corrupt, or two hold the same tensor.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.description = str(paths[0].parent if len(paths) > 1 else paths[0])
        self.folder = paths[0].parent
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, Sequence[int]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt", device="cpu")
                names = list(file.keys())  # type: ignore[no-untyped-call]
                shapes = {name: self._shape(file, name) for name in names}
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelLoadError(
                    f"{path} is truncated or corrupt ({error}); it has {path.stat().st_size:,} bytes. Fetch it again."
                ) from error
            twice = next((name for name in names if name in self._files), None)
            if twice is not None:
                raise ModelLoadError(f"{self.description}: tensor {twice!r} stands in two files, {path.name} is one.")
            self._files.update(dict.fromkeys(names, file))
            self._shapes.update(shapes)

    @staticmethod
    def _shape(file: Any, name: str) -> Sequence[int]:
        shape: Sequence[int] = file.get_slice(name).get_shape()
        return shape

    def shapes(self) -> Mapping[str, Sequence[int]]:
        return self._shapes

    def read(self, spec: WeightSpec, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        file = self._files[spec.name]
        if rows == ALL and columns == ALL:
            tensor: torch.Tensor = file.get_tensor(spec.name)
        elif columns == ALL:
            tensor = file.get_slice(spec.name)[rows]
        else:
            tensor = file.get_slice(spec.name)[rows, columns]
        if not tensor.dtype.is_floating_point:
            raise ModelLoadError(
                f"tensor {spec.name!r} in {self.description} holds {tensor.dtype}; plain weights are floats. Quantised "
                "checkpoints are not read: take the plain one."
            )
        return tensor

    def close(self) -> None:
        self._files.clear()
