"""Functional ops: norms, activations, rope, the fused write, LSE merge, sampling."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import AttentionSpec, LayerArgs, LayerCache, QKVShape, RopeTable
from dougong_compat.execute.context import Refused
from dougong_compat.harness.guard import Watch, poison
from dougong_compat.harness.memory import trapped_copy
from dougong_compat.harness.placement import plane_shape
from dougong_compat.numbers import dtype_of
from dougong_compat.op_inputs import make, rope_table, sample_inputs
from dougong_compat.problem import layout_text

__all__ = ["execute", "execute_sample"]

#: Ops that may reuse their inputs' memory.
_SCRATCH = {"add_rms_norm": ("x", "residual"), "qk_norm_rope_write": ("qkv",)}


def _place(x: torch.Tensor, params: dict[str, Any], device: torch.device) -> torch.Tensor:
    return trapped_copy(x) if params.get("guard") and device.type == "cpu" else x.to(device)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with room between tokens and between heads."""
    wide = torch.full((x.shape[0], *(2 * n for n in x.shape[1:-1]), x.shape[-1] + 8), float("nan"), dtype=x.dtype)
    index = (slice(None), *(slice(0, 2 * n, 2) for n in x.shape[1:-1]), slice(0, x.shape[-1]))
    view = wide.to(x.device)[index]
    view.copy_(x)
    return view


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    params = request["params"]
    dtype, op, device = dtype_of(params["dtype"]), params["op"], ctx.device.torch_device
    x = {name: _place(value, params, device) for name, value in make(params, request["seed"]).items()}
    for side in {"a": "a", "b": "b", "both": "ab"}.get(params.get("strided", ""), ""):
        x[f"out_{side}"] = _strided(x[f"out_{side}"])
    if params.get("strided") == "x":
        x["x"] = _strided(x["x"])
    table = ctx.ops(dtype, ctx.layout(params))
    message["provider"] = table.choices[op].candidate.label
    watch = Watch({name: value for name, value in x.items() if name not in _SCRATCH.get(op, ())})
    function = getattr(table, op)
    eps, offset = params.get("eps", 1e-6), params.get("offset", 0.0)
    if op == "rms_norm":
        tensors["y"] = function(x["x"], x["weight"], eps, offset)
    elif op == "add_rms_norm":
        tensors["y"], tensors["residual"] = function(x["x"], x["residual"], x["weight"], eps, offset)
    elif op in ("silu_mul", "gelu_tanh_mul"):
        tensors["y"] = function(x["x"])
    elif op == "rope":
        tensors["y"] = function(x["x"], RopeTable(rope_table(params).to(device), params["interleaved"]), x["positions"])
    elif op == "merge_lse":
        tensors["y"], tensors["lse"] = function(x["out_a"], x["lse_a"], x["out_b"], x["lse_b"])
    else:
        _fused(ctx, params, x, function, tensors, dtype)
    ctx.device.synchronize()
    for name, value in tensors.items():
        tensors[name] = value.cpu()
    message["findings"] += watch.findings()


def _fused(
    ctx: Any, params: dict[str, Any], x: dict[str, torch.Tensor], function: Any, tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    device = ctx.device.torch_device
    H, K, D, Dv = params["H"], params["K"], params["D"], params["Dv"]
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=D, head_dim_v=Dv, dtype=dtype)
    layout = ctx.layout(params)
    reason = layout.refusal(params["block"], [(K, D), (K, Dv)], dtype.itemsize)
    if reason:
        raise Refused(reason)
    planes = {}
    for name, text, dim in zip("kv", layout_text(params), (D, Dv), strict=True):
        shape = plane_shape(text, params["blocks"], params["block"], K, dim, dtype.itemsize)
        planes[name] = poison(torch.empty(shape, dtype=dtype, device=device))
    cache = None if params.get("no_cache") else LayerCache(planes, layout, params["block"], spec)
    norms = params.get("norms", True)
    heads = QKVShape(
        H, K, D, Dv, x["q_norm"] if norms else None, x["k_norm"] if norms else None, 1e-6, params.get("offset", 0.0)
    )
    rope = RopeTable(rope_table(params).to(device), params["interleaved"]) if params["R"] else None
    tensors["y"] = function(x["qkv"], heads, rope, x["positions"], LayerArgs(), cache, x["slots"]).clone()
    for name, plane in planes.items():
        tensors[name] = plane.clone()


def execute_sample(
    ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    table = ctx.ops(torch.float32)
    message["provider"] = table.choices["sample"].candidate.label
    x = {
        name: value.to(ctx.device.torch_device)
        for name, value in sample_inputs(request["params"], request["seed"]).items()
    }
    chosen = table.sample(
        x["logits"].clone(),
        x["temperature"],
        x.get("top_k"),
        x.get("top_p"),
        x.get("min_p"),
        x["seeds"],
        x["positions"],
    )
    tensors["ids"] = chosen.cpu()
    if request["params"].get("alone"):  # each row alone must choose as it did in company
        alone = []
        for row in range(x["logits"].shape[0]):
            part = {name: value[row : row + 1] for name, value in x.items()}
            alone.append(
                table.sample(
                    part["logits"].clone(),
                    part["temperature"],
                    part.get("top_k"),
                    part.get("top_p"),
                    part.get("min_p"),
                    part["seeds"],
                    part["positions"],
                ).cpu()
            )
        tensors["alone"] = torch.cat(alone)
