"""A paged cache for a problem: every stride a layout allows, poison wherever nothing was written."""

from __future__ import annotations

import torch

from dougong_compat.harness.guard import poison
from dougong_compat.harness.memory import lazy_bytes, trapped_copy
from dougong_compat.harness.placement import plane_shape, scatter
from dougong_compat.problem import Problem, layout_text

__all__ = ["CannotAllocate", "make_planes", "plane_texts"]

#: Elements between blocks of a giant cache: one block lies past 2^31 elements, whatever the dtype.
GIANT_STRIDE = 2**31 + 4096


class CannotAllocate(Exception):
    """This machine cannot give the memory that a case wants: the suite's own skip."""


def plane_texts(problem: Problem) -> dict[str, tuple[str, int, int]]:
    """Plane name -> (axes, heads, dim)."""
    k, v = layout_text(problem.params)
    if problem.params["latent"]:
        return {"k": (k, problem.K, problem.D)}
    return {"k": (k, problem.K, problem.D), "v": (v, problem.K, problem.Dv)}


def make_planes(problem: Problem, device: torch.device) -> dict[str, torch.Tensor]:
    """Poisoned planes on ``device`` with the problem's visible tokens in them (the new ones too, unless the kernel
    is asked to write those).

    Raises:
        CannotAllocate: a giant that does not fit.
    """
    planes = _empty(problem, device)
    for plane in planes.values():
        poison(plane, problem.params["tail"])
    new = problem.params["write"]
    for row in range(len(problem.kv_lens)):
        slots = problem.row_slots(row)
        live = slots >= 0
        if new:
            live &= torch.arange(len(slots)) < problem.kv_lens[row] - problem.q_lens[row]
        span = slice(problem.kv_at[row], problem.kv_at[row + 1])
        for name, (text, _, _) in plane_texts(problem).items():
            values = (problem.k if name == "k" else problem.v)[span]
            scatter(text, planes[name], slots[live], values[live], problem.block)
    for slot, k, v in problem.extra.get("loud", ()):
        where = torch.tensor([slot])
        for name, (text, _, _) in plane_texts(problem).items():
            scatter(text, planes[name], where, (k if name == "k" else v)[None], problem.block)
    if problem.params["guard"] and device.type == "cpu":
        planes = {name: trapped_copy(plane) for name, plane in planes.items()}
    return planes


def _empty(problem: Problem, device: torch.device) -> dict[str, torch.Tensor]:
    blocks, n, dtype = problem.num_blocks, problem.block, problem.kv_dtype
    shapes = {
        name: plane_shape(text, blocks, n, heads, dim, dtype.itemsize)
        for name, (text, heads, dim) in plane_texts(problem).items()
    }
    kind = problem.params["stride"]
    if kind == "plain":
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    if kind == "gap":  # room behind every block, as where another layer's planes lie there
        return {name: _strided(shape, dtype, device, _count(shape[1:]) + 48) for name, shape in shapes.items()}
    if kind == "interleaved":  # K and V of a block side by side: the block stride is twice a block
        return _interleaved(shapes, dtype, device, 1)
    if kind == "layers":  # a page holds K and V of three layers, ours the middle one
        return _interleaved(shapes, dtype, device, 3)
    if kind == "heads":  # tokens and heads swapped in memory, the same axes in name
        planes = {}
        for name, (b, n_, h, d) in shapes.items():
            planes[name] = torch.empty(b, h, n_, d, dtype=dtype, device=device).transpose(1, 2)
        return planes
    if kind == "padded":  # every head's vector has room behind it
        return {
            name: poison(torch.empty(*shape[:-1], shape[-1] + 16, dtype=dtype, device=device))[..., : shape[-1]]
            for name, shape in shapes.items()
        }
    if kind in ("giant", "wide"):
        stride = GIANT_STRIDE if kind == "giant" else 2**31 // 3
        _check_room(sum(_giant_bytes(shape, dtype, stride) for shape in shapes.values()), device)
        return {name: _giant(shape, dtype, device, stride) for name, shape in shapes.items()}
    raise ValueError(f"unknown stride {kind!r}")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _inner(shape: tuple[int, ...]) -> list[int]:
    """Contiguous strides of all dimensions but the first."""
    strides = [1]
    for size in reversed(shape[2:]):
        strides.insert(0, strides[0] * size)
    return strides


def _strided(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, stride: int) -> torch.Tensor:
    flat = poison(torch.empty(shape[0] * stride, dtype=dtype, device=device))
    return flat.as_strided(shape, [stride, *_inner(shape)])


def _interleaved(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, layers: int
) -> dict[str, torch.Tensor]:
    page = sum(_count(shape[1:]) for shape in shapes.values())
    blocks = next(iter(shapes.values()))[0]
    flat = poison(torch.empty(blocks * page * layers, dtype=dtype, device=device))
    at = page * (layers // 2)
    planes = {}
    for name, shape in shapes.items():
        planes[name] = flat.as_strided(shape, [page * layers, *_inner(shape)], at)
        at += _count(shape[1:])
    return planes


def _giant_bytes(shape: tuple[int, ...], dtype: torch.dtype, stride: int) -> int:
    return ((shape[0] - 1) * stride + _count(shape[1:])) * dtype.itemsize


def _check_room(size: int, device: torch.device) -> None:
    """Leave a quarter of what is free on an accelerator, where memory is not committed lazily, to other workers."""
    if device.type == "cpu":
        return
    query = getattr(torch.get_device_module(device.type), "mem_get_info", None)
    free = query(device)[0] if query is not None else None
    if free is not None and size > 0.75 * free:
        raise CannotAllocate(f"{size / 2**30:.1f} GiB asked for, {free / 2**30:.1f} GiB free on {device}")


def _giant(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, stride: int) -> torch.Tensor:
    size = _giant_bytes(shape, dtype, stride)
    try:
        if device.type == "cpu":
            flat = lazy_bytes(size).view(dtype)
        else:
            flat = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        raise CannotAllocate(f"{size / 2**30:.1f} GiB of address space: {error}") from error
    return flat.as_strided(shape, [stride, *_inner(shape)])
