"""How keys and values lie in memory, described once by named axes.

From a description such as ``"b n h d"`` come allocation, a generic reader and writer, conversion between any two
layouts, and the conformance tests. Axes: ``b`` block, ``n`` slot in the block, ``h`` kv head, ``d`` head
dimension. ``d/16 … 16`` splits an axis into tiles of 16 (the outer part where ``d/16`` stands, the inner
part where ``16`` stands); ``d/x … x`` does so with as many elements as fit in 16 bytes; parentheses merge
neighbouring axes into one dimension.

    "b n h d"              plain
    "b h n d"              heads outside
    "b (h d/16) n 16"      Ascend NZ
    "b h d/x n x"          ROCm's packed keys
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch

__all__ = [
    "HND",
    "NHD",
    "NZ16",
    "X_PACKED",
    "AnySize",
    "BlockSizes",
    "Exactly",
    "KVLayout",
    "Multiple",
    "OneOf",
    "PlaneLayout",
]

_TOKEN = re.compile(r"\(|\)|[a-z](?:/(?:\d+|x))?|\d+|x")
_AXES = "bnhd"


@dataclass(frozen=True)
class BlockSizes:
    """The block sizes (tokens per block) that a layout allows."""

    def allows(self, size: int) -> bool:
        raise NotImplementedError

    def nearest(self, size: int) -> int:
        """The allowed size that lies closest, to name in a refusal."""
        raise NotImplementedError


@dataclass(frozen=True)
class AnySize(BlockSizes):
    def allows(self, size: int) -> bool:
        return size >= 1

    def nearest(self, size: int) -> int:
        return max(1, size)

    def __str__(self) -> str:
        return "any"


@dataclass(frozen=True)
class Multiple(BlockSizes):
    of: int
    up_to: int | None = None

    def allows(self, size: int) -> bool:
        return size >= 1 and size % self.of == 0 and (self.up_to is None or size <= self.up_to)

    def nearest(self, size: int) -> int:
        near = max(self.of, round(size / self.of) * self.of)
        return near if self.up_to is None else min(near, self.up_to)

    def __str__(self) -> str:
        return f"multiples of {self.of}" + ("" if self.up_to is None else f" up to {self.up_to}")


@dataclass(frozen=True)
class OneOf(BlockSizes):
    sizes: tuple[int, ...]

    def allows(self, size: int) -> bool:
        return size in self.sizes

    def nearest(self, size: int) -> int:
        return min(self.sizes, key=lambda allowed: abs(allowed - size))

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.sizes))


def Exactly(size: int) -> OneOf:
    """Only this size."""
    return OneOf((size,))


@dataclass(frozen=True)
class _Part:
    axis: str
    role: str  # "whole", "outer" or "inner"


@dataclass(frozen=True)
class PlaneLayout:
    """One plane's axes, parsed. ``tiles`` maps a split axis to its tile, 0 standing for 16 bytes' worth."""

    text: str
    dims: tuple[tuple[_Part, ...], ...]
    tiles: Mapping[str, int]

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> PlaneLayout:
        """Read an axis description.

        Raises:
            ValueError: an axis is missing, doubled or unknown, or a tile has no inner part.
        """
        if _TOKEN.sub("", text).strip():
            raise ValueError(f"layout {text!r}: cannot read {_TOKEN.sub('', text).strip()!r}")
        dims: list[tuple[_Part, ...]] = []
        tiles: dict[str, int] = {}
        group: list[_Part] | None = None
        for token in _TOKEN.findall(text):
            if token == "(":
                if group is not None:
                    raise ValueError(f"layout {text!r}: parentheses do not nest")
                group = []
            elif token == ")":
                if not group:
                    raise ValueError(f"layout {text!r}: unbalanced or empty parentheses")
                dims.append(tuple(group))
                group = None
            else:
                part = _parse_part(token, text, tiles)
                if group is None:
                    dims.append((part,))
                else:
                    group.append(part)
        if group is not None:
            raise ValueError(f"layout {text!r}: unbalanced parentheses")
        parts = [part for dim in dims for part in dim]
        for axis in _AXES:
            roles = sorted(part.role for part in parts if part.axis == axis)
            if roles not in (["whole"], ["inner", "outer"]):
                raise ValueError(f"layout {text!r}: axis {axis!r} must stand once, whole or as outer and inner")
        return PlaneLayout(text, tuple(dims), tiles)

    def _tile(self, axis: str, itemsize: int) -> int:
        return self.tiles[axis] or 16 // itemsize

    def _extents(self, sizes: Mapping[str, int], itemsize: int) -> dict[_Part, int]:
        out: dict[_Part, int] = {}
        for part in (part for dim in self.dims for part in dim):
            size = sizes[part.axis]
            if part.role == "whole":
                out[part] = size
                continue
            tile = self._tile(part.axis, itemsize)
            if size % tile:
                raise ValueError(f"layout {self.text!r}: {part.axis}={size} is not a multiple of its tile {tile}")
            out[part] = tile if part.role == "inner" else size // tile
        return out

    def shape(self, blocks: int, block_size: int, heads: int, dim: int, itemsize: int) -> tuple[int, ...]:
        """The plane's physical shape.

        Raises:
            ValueError: a size is not a multiple of its tile.
        """
        extents = self._extents({"b": blocks, "n": block_size, "h": heads, "d": dim}, itemsize)
        shape = []
        for parts in self.dims:
            size = 1
            for part in parts:
                size *= extents[part]
            shape.append(size)
        return tuple(shape)

    def canonical(self, plane: torch.Tensor, block_size: int, heads: int, dim: int) -> torch.Tensor:
        """A view with dimensions in the order b, n, h, d, a tiled axis giving two (outer, inner).

        The view shares the plane's memory, so writing to it writes the plane.
        """
        sizes = {"b": -1, "n": block_size, "h": heads, "d": dim}
        blocks = self._blocks(plane)
        sizes["b"] = blocks
        extents = self._extents(sizes, plane.element_size())
        view, order = plane, list[_Part]()
        at = 0
        for parts in self.dims:
            if len(parts) > 1:
                view = torch.unflatten(view, at, [extents[part] for part in parts])
            order += parts
            at += len(parts)
        rank = {"b": 0, "n": 1, "h": 2, "d": 3}
        wanted = sorted(order, key=lambda part: (rank[part.axis], part.role != "outer"))
        return view.permute(tuple(order.index(part) for part in wanted))

    def _blocks(self, plane: torch.Tensor) -> int:
        first = self.dims[0]
        assert first == (_Part("b", "whole"),), "every layout keeps blocks outermost"
        return plane.shape[0]

    def read(self, plane: torch.Tensor, slots: torch.Tensor, block_size: int, heads: int, dim: int) -> torch.Tensor:
        """Gather tokens: ``slots`` [T] int64 on the plane's device -> a new tensor [T, heads, dim]."""
        view = self.canonical(plane, block_size, heads, dim)
        return view[self._index(plane, slots, block_size)].reshape(slots.shape[0], heads, dim)

    def write(self, plane: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, block_size: int) -> None:
        """Scatter ``values`` [T, heads, dim] to ``slots`` [T] int64; nothing else changes."""
        tokens, heads, dim = values.shape
        view = self.canonical(plane, block_size, heads, dim)
        tail = view.shape[2 + ("n" in self.tiles) :]
        view[self._index(plane, slots, block_size)] = values.reshape(tokens, *tail).to(plane.dtype)

    def _index(self, plane: torch.Tensor, slots: torch.Tensor, block_size: int) -> tuple[torch.Tensor, ...]:
        block = torch.div(slots, block_size, rounding_mode="floor")
        place = slots - block * block_size
        if "n" not in self.tiles:
            return block, place
        tile = self._tile("n", plane.element_size())
        outer = torch.div(place, tile, rounding_mode="floor")
        return block, outer, place - outer * tile


def _parse_part(token: str, text: str, tiles: dict[str, int]) -> _Part:
    if "/" in token:
        axis, tile = token.split("/")
        if axis not in _AXES or axis in tiles:
            raise ValueError(f"layout {text!r}: cannot split {token!r}")
        tiles[axis] = 0 if tile == "x" else int(tile)
        return _Part(axis, "outer")
    if token in _AXES:
        return _Part(token, "whole")
    wanted = 0 if token == "x" else int(token) if token.isdigit() else -1
    for axis, tile_size in tiles.items():
        if tile_size == wanted:
            return _Part(axis, "inner")
    raise ValueError(f"layout {text!r}: {token!r} is no axis and no tile that was split before it")


@dataclass(frozen=True)
class KVLayout:
    """A named memory layout of one layer's cache.

    ``planes`` maps a plane's name (``k`` and ``v``; ``latent`` and ``rope`` for MLA kept apart) to its axes.
    ``block_sizes`` are allowed tokens per block; ``default_block`` is taken when the user names none.
    ``max_elements`` bounds a plane's element count where the hardware counts in 32 bits.
    """

    name: str
    planes: Mapping[str, str] = field(default_factory=lambda: {"k": "b n h d", "v": "b n h d"})
    block_sizes: BlockSizes = field(default_factory=AnySize)
    default_block: int = 16
    max_elements: int | None = None

    def __post_init__(self) -> None:
        for text in self.planes.values():
            PlaneLayout.parse(text)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.planes.items())), self.default_block, self.max_elements))

    @cached_property
    def parsed(self) -> dict[str, PlaneLayout]:
        return {name: PlaneLayout.parse(text) for name, text in self.planes.items()}

    def refusal(self, block_size: int, plane_dims: Sequence[tuple[int, int]], itemsize: int) -> str:
        """Why this layout cannot hold such blocks, '' if it can. ``plane_dims``: (heads, dim) per plane."""
        if not self.block_sizes.allows(block_size):
            return (
                f"block size {block_size}: layout {self.name} allows {self.block_sizes}; "
                f"the nearest is {self.block_sizes.nearest(block_size)}"
            )
        for plane, (heads, dim) in zip(self.parsed.values(), plane_dims, strict=False):
            try:
                plane.shape(1, block_size, heads, dim, itemsize)
            except ValueError as error:
                return str(error)
        return ""

    def max_blocks(self, block_size: int, heads: int, dim: int) -> int | None:
        """The most blocks a plane may have under ``max_elements``; None without a bound."""
        return None if self.max_elements is None else self.max_elements // (block_size * heads * dim)


NHD = KVLayout("nhd")
HND = KVLayout("hnd", {"k": "b h n d", "v": "b h n d"})
NZ16 = KVLayout("nz16", {"k": "b (h d/16) n 16", "v": "b (h d/16) n 16"}, Multiple(16), 128, 2**31 - 1)
X_PACKED = KVLayout("x_packed", {"k": "b h d/x n x", "v": "b h d n"}, OneOf((16, 32)), 16)
