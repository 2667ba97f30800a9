"""Judging block copies and conversions: bytes."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.harness.placement import plane_shape
from dougong_compat.outcome import Judgement
from dougong_compat.problem import build, layout_text
from dougong_compat.tolerance import Tolerance

__all__ = ["judge_convert", "judge_copy"]


def _before(params: dict[str, Any], seed: int, name: str) -> torch.Tensor:
    problem = build(params, seed)
    text = layout_text(problem.params)[name == "v"]
    dim = problem.D if name == "k" else problem.Dv
    itemsize = problem.kv_dtype.itemsize
    shape = plane_shape(text, problem.num_blocks, problem.block, problem.K, dim, itemsize)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * itemsize), generator=generator).to(torch.uint8)


def _judge(params: dict[str, Any], seed: int, tensors: dict[str, torch.Tensor], layers: int) -> Judgement:
    names = ["k"] if params.get("latent") else ["k", "v"]
    for layer in range(layers):
        for name in names:
            want = _before(params, seed + layer, name)
            if params["source"]:
                want[params["target"]] = want[params["source"]]
            got = tensors[f"{layer}_{name}"]
            if got.shape != want.shape:
                return Judgement(False, f"plane {name} has {tuple(got.shape)} bytes, expected {tuple(want.shape)}")
            wrong = (got != want).flatten(1).any(1).nonzero()[:, 0].tolist()
            if wrong:
                return Judgement(
                    False, f"plane {name} of layer {layer}: blocks {wrong[:8]} differ from what they should hold"
                )
    return Judgement(True, margin=0.0)


def judge_copy(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    return _judge(request["params"], request["seed"], tensors, request["params"].get("num_layers", 2))


def judge_convert(
    request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor], tolerance: Tolerance
) -> Judgement:
    return _judge(request["params"], request["seed"], tensors, 1)
