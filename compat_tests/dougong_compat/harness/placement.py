"""Tokens into and out of a cache plane, by index arithmetic over the layout's axes.

The core has code for this too (``KVLayout``); the suite has its own, so that a mistake there cannot hide one here.
"""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["gather", "plane_shape", "scatter"]

_Part = tuple[str, str, int]  # axis, role (whole | outer | inner), tile


@lru_cache(maxsize=64)
def _parse(text: str, itemsize: int) -> tuple[tuple[_Part, ...], ...]:
    """``"b (h d/16) n 16"`` -> ((b), (h, d outer), (n), (d inner))."""
    dims: list[tuple[_Part, ...]] = []
    merged: list[_Part] | None = None
    open_tiles: list[tuple[str, int]] = []
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            merged = []
            continue
        if word == ")":
            assert merged
            dims.append(tuple(merged))
            merged = None
            continue
        if "/" in word:
            axis, tile = word.split("/")
            size = 16 // itemsize if tile == "x" else int(tile)
            open_tiles.append((axis, size))
            part = (axis, "outer", size)
        elif word in "bnhd":
            part = (word, "whole", 1)
        else:
            size = 16 // itemsize if word == "x" else int(word)
            axis = next(a for a, s in open_tiles if s == size)
            part = (axis, "inner", size)
        if merged is None:
            dims.append((part,))
        else:
            merged.append(part)
    return tuple(dims)


def _extent(part: _Part, sizes: dict[str, int]) -> int:
    axis, role, tile = part
    if role == "whole":
        return sizes[axis]
    return tile if role == "inner" else sizes[axis] // tile


def plane_shape(text: str, blocks: int, block: int, heads: int, dim: int, itemsize: int) -> tuple[int, ...]:
    """The plane's physical shape. Raises ValueError where a tile does not divide its axis."""
    sizes = {"b": blocks, "n": block, "h": heads, "d": dim}
    shape = []
    for parts in _parse(text, itemsize):
        size = 1
        for part in parts:
            axis, role, tile = part
            if role == "outer" and sizes[axis] % tile:
                raise ValueError(f"{axis}={sizes[axis]} is not a multiple of {tile}")
            size *= _extent(part, sizes)
        shape.append(size)
    return tuple(shape)


def _index(
    text: str, plane: torch.Tensor, slots: torch.Tensor, block: int, heads: int, dim: int
) -> tuple[torch.Tensor, ...]:
    """Index tensors, one per physical dimension, each broadcasting to [T, heads, dim]."""
    slots = slots.to(plane.device)
    logical = {
        "b": (slots // block)[:, None, None],
        "n": (slots % block)[:, None, None],
        "h": torch.arange(heads, device=plane.device)[None, :, None],
        "d": torch.arange(dim, device=plane.device)[None, None, :],
    }
    sizes = {"b": plane.shape[0], "n": block, "h": heads, "d": dim}
    index = []
    for parts in _parse(text, plane.element_size()):
        at = torch.zeros(1, 1, 1, dtype=torch.int64, device=plane.device)
        for part in parts:
            axis, role, tile = part
            value = logical[axis]
            if role == "outer":
                value = value // tile
            elif role == "inner":
                value = value % tile
            at = at * _extent(part, sizes) + value
        index.append(at)
    return tuple(index)


def scatter(text: str, plane: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, block: int) -> None:
    """Put values [T, heads, dim] at ``slots`` [T] int64."""
    if not slots.numel():
        return
    values = values.to(plane.device)
    if text == "b n h d":
        plane[(slots // block).to(plane.device), (slots % block).to(plane.device)] = values
        return
    plane[_index(text, plane, slots, block, values.shape[1], values.shape[2])] = values


def gather(text: str, plane: torch.Tensor, slots: torch.Tensor, block: int, heads: int, dim: int) -> torch.Tensor:
    """The tokens at ``slots`` [T] int64 -> [T, heads, dim]."""
    return plane[_index(text, plane, slots, block, heads, dim)]
