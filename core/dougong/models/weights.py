"""What a model wants of its checkpoint, and what a checkpoint must be able to give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dougong.errors import ModelLoadError
from dougong.hal import QuantizedWeight

__all__ = ["ALL", "WeightSource", "WeightSpec"]

ALL = slice(None)
_NAMED = 4


@dataclass(frozen=True)
class WeightSpec:
    """A tensor by its name and shape in a transformers checkpoint.

    ``init`` is what dummy weights put there: ``"normal"``, ``"one"`` or ``"zero"``.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"


class WeightSource(ABC):
    """Where weights come from. Tensors may alias a mapped file: who keeps one copies it."""

    description: str
    """The file or folder, for messages."""

    @abstractmethod
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Name -> shape of all it holds, by transformers' names."""

    @abstractmethod
    def read(self, spec: WeightSpec, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """A part of a tensor, in a float dtype, on any device. ``rows`` cut dimension 0, ``columns`` dimension 1."""

    def read_quantized(self, spec: WeightSpec) -> QuantizedWeight | None:
        """The matrix in few bits as it is stored; None where it is stored otherwise."""
        return None

    def close(self) -> None:
        """Let go of files."""
        return None

    def check(self, wanted: Iterable[WeightSpec], ignored: Iterable[str] = ()) -> None:
        """Compare names and shapes with what the model wants, before anything is loaded.

        ``ignored`` are parts of names that may be there and are not read.

        Raises:
            ModelLoadError: tensors are missing, of another shape, or would not be read.
        """
        held = self.shapes()
        specs = {spec.name: spec for spec in wanted}
        missing = [name for name in specs if name not in held]
        shaped = [
            f"{name}: {list(held[name])} where the config says {list(spec.shape)}"
            for name, spec in specs.items()
            if name in held and tuple(held[name]) != spec.shape
        ]
        parts = tuple(ignored)
        unexpected = [name for name in held if name not in specs and not any(part in name for part in parts)]
        complaints = [
            f"{len(names)} {what} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
            for names, what in (
                (missing, "missing"),
                (shaped, "of another shape"),
                (unexpected, "not part of the model"),
            )
            if names
        ]
        if complaints:
            raise ModelLoadError(
                f"the weights in {self.description} do not match the config: of {len(specs)} tensors wanted and "
                f"{len(held)} found, {'; '.join(complaints)}. Use the config.json that belongs to these weights."
            )
