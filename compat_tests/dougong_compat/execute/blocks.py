"""Copying blocks and converting them between layouts."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import LayerCache, convert_blocks
from dougong_compat.execute.context import Refused
from dougong_compat.harness.cachemaker import make_planes
from dougong_compat.harness.call import spec_of
from dougong_compat.problem import build

__all__ = ["execute_convert", "execute_copy"]


def _cache(ctx: Any, params: dict[str, Any], seed: int) -> LayerCache:
    problem = build(params, seed)
    layout = ctx.layout(problem.params)
    spec = spec_of(problem)
    dims = [spec.plane_dims(name) for name in layout.planes]
    reason = layout.refusal(problem.block, dims, spec.kv_dtype.itemsize)
    if reason:
        raise Refused(reason)
    cache = LayerCache(make_planes(problem, ctx.device.torch_device), layout, problem.block, spec)
    for plane in cache.planes.values():  # contents do not matter to a copy: fill all with bytes of every kind
        fill(plane, seed)
    return cache


def fill(plane: torch.Tensor, seed: int) -> None:
    """Random bytes, NaN patterns included, in index order."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*plane.shape[:-1], plane.shape[-1] * plane.element_size()), generator=generator)
    plane.copy_(raw.to(torch.uint8).view(plane.dtype).to(plane.device))


def raw(plane: torch.Tensor) -> torch.Tensor:
    return plane.cpu().contiguous().view(torch.uint8)


def execute_copy(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The backend's copy_blocks over several layers; every plane goes back."""
    params, seed, device = request["params"], request["seed"], ctx.device.torch_device
    caches = [_cache(ctx, params, seed + layer) for layer in range(params.get("num_layers", 2))]
    table = ctx.ops(caches[0].spec.dtype, caches[0].layout)
    message["provider"] = table.choices["copy_blocks"].candidate.label
    source = torch.tensor(params["source"], dtype=torch.int64, device=device)
    target = torch.tensor(params["target"], dtype=torch.int64, device=device)
    table.copy_blocks(caches, source, target)
    ctx.device.synchronize()
    if source.tolist() != params["source"] or target.tolist() != params["target"]:
        message["findings"].append("copy_blocks changed its lists of blocks")
    for layer, cache in enumerate(caches):
        for name, plane in cache.planes.items():
            tensors[f"{layer}_{name}"] = raw(plane)


def execute_convert(
    ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """There and back between two layouts: what comes back must be what went."""
    params, seed = request["params"], request["seed"]
    source = _cache(ctx, params, seed)
    middle = _cache(ctx, {**params, "layout": params["through"], "block": params["through_block"]}, seed + 1)
    device = ctx.device.torch_device
    blocks = torch.tensor(params["source"], dtype=torch.int64, device=device)
    count = len(params["source"]) * source.block_size // middle.block_size
    there = torch.arange(1, 1 + count, device=device)
    back = torch.tensor(params["target"], dtype=torch.int64, device=device)
    convert_blocks(source, blocks, middle, there)
    convert_blocks(middle, there, source, back)
    ctx.device.synchronize()
    for name, plane in source.planes.items():
        tensors[f"0_{name}"] = raw(plane)
