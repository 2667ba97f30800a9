"""Reading a GGUF file's header and mapping its tensors. About a hundred times faster than looking at each token.

Format: the GGUF specification in ggml's documentation (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dougong.errors import ModelLoadError

__all__ = ["GGUFFile", "GGUFTensor"]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place. ``shape`` is in torch's order (rows first); ``type`` is ggml's number of its block format."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    num_bytes: int


class GGUFFile:
    """A mapped file: ``metadata`` and ``tensors`` by name.

    Raises:
        ModelLoadError: it is no GGUF file, of a version not known, or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}.") from error
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._header()
        except (
            struct.error, IndexError, KeyError, MemoryError, OverflowError, RecursionError, TypeError, ValueError
        ) as error:  # fmt: skip
            raise ModelLoadError(
                f"{path} is truncated or corrupt: its header breaks off at byte {self._at:,} of {len(self._map):,} "
                f"({type(error).__name__}). Fetch it again."
            ) from error

    def bytes_of(self, tensor: GGUFTensor) -> np.ndarray[Any, Any]:
        """The raw blocks as uint8 [bytes], aliasing the (read-only) file."""
        return np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)

    def _header(self) -> None:
        size = len(self._map)
        if self._map[:4] != b"GGUF":
            raise ModelLoadError(f"{self.path} is no GGUF file: it begins with {self._map[:4]!r}, not b'GGUF'.")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelLoadError(
                f"{self.path} is GGUF version {version}; versions 2 and 3, little-endian, are read. Convert it anew."
            )
        num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
        for _ in range(num_values):
            key = self._name()
            self.metadata[key] = self._value(self._scalar("<I"))
        entries = []
        for _ in range(num_tensors):
            name = self._name()
            rank = self._scalar("<I")
            if rank > 8:
                raise ModelLoadError(f"{self.path} is corrupt: tensor {name!r} claims {rank} dimensions.")
            dims = [self._scalar("<Q") for _ in range(rank)]
            entries.append((name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")))
        alignment = int(self.metadata.get("general.alignment", 32))
        if alignment < 1:
            raise ModelLoadError(f"{self.path} is corrupt: its data is aligned to {alignment} bytes.")
        base = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in entries:
            tensor = GGUFTensor(name, shape, kind, base + offset, _num_bytes(shape, kind, name, self.path))
            if tensor.offset + tensor.num_bytes > size:
                raise ModelLoadError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {tensor.offset + tensor.num_bytes:,} and "
                    f"the file has {size:,}. Fetch it again."
                )
            self.tensors[name] = tensor

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._map, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        end = self._at + length
        if end > len(self._map):
            raise IndexError(length)
        text = self._map[self._at : end].decode("utf-8", "surrogateescape")
        self._at = end
        return text

    def _name(self) -> str:
        name = self._string()
        name.encode()  # unlike a token's, its bytes are whole characters
        return name

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        inner, count = self._scalar("<I"), self._scalar("<Q")
        if inner in (_STRING, _ARRAY):
            return [self._value(inner) for _ in range(count)]
        code = _SCALARS[inner]
        values = np.frombuffer(self._map, np.dtype(code), count, self._at) if count else np.empty(0)
        self._at += values.nbytes
        return values.tolist()


def _num_bytes(shape: tuple[int, ...], kind: int, name: str, path: Path) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ModelLoadError(f"{path}: tensor {name!r} has block format {kind}, which is not known here.") from None
    count = 1
    for extent in shape:
        count *= extent
    if shape and shape[-1] % block:
        raise ModelLoadError(
            f"{path} is corrupt: rows of {shape[-1]} in tensor {name!r} are no whole blocks of {block}."
        )
    return count // block * size
