"""Judging functional ops against float64 formulas written from their definitions."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.harness.placement import gather, plane_shape, scatter
from dougong_compat.numbers import bits, dtype_of, unit_roundoff
from dougong_compat.op_inputs import make, rope_table
from dougong_compat.outcome import Judgement
from dougong_compat.problem import layout_text
from dougong_compat.tolerance import Tolerance, judge_elements

__all__ = ["judge"]

_Tensors = dict[str, torch.Tensor]


def judge(request: dict[str, Any], message: dict[str, Any], tensors: _Tensors, tolerance: Tolerance) -> Judgement:
    """Per element |y - g| <= f·u·|g| and what the definition's float32 steps may lose, f by the number of roundings."""
    params = request["params"]
    x = make(params, request["seed"])
    dtype = dtype_of(params["dtype"])
    y = tensors.get("y")
    if y is None or y.dtype != dtype:
        return Judgement(False, f"the answer is {None if y is None else y.dtype}, expected {dtype}")
    u = unit_roundoff(dtype) * (tolerance.units / 4)
    least = torch.finfo(dtype).smallest_normal * u * 2
    return _JUDGES[params["op"]](params, x, tensors, u, least)


def _norm(params: dict[str, Any], x: _Tensors, tensors: _Tensors, u: float, least: float) -> Judgement:
    wide, weight, offset = x["x"].double(), x["weight"].double(), params.get("offset", 0.0)
    if "residual" in x:
        total = wide + x["residual"].double()
        verdict = judge_elements(tensors["residual"], total, total.abs() * u * 1.01 + least, "the new residual")
        if not verdict.ok:
            return verdict
        wide = (x["x"] + x["residual"]).double()
    rms = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + params.get("eps", 1e-6))
    factor = weight + offset if offset else weight
    want = wide / rms * factor
    roundings = (4.5 if "residual" in x else 3.0) if not offset else 2.5
    return judge_elements(tensors["y"], want, want.abs() * (roundings * u + 2.0**-20) + least * (1 + factor.abs()), "y")


def _gated(params: dict[str, Any], x: _Tensors, tensors: _Tensors, u: float, least: float) -> Judgement:
    gate, up = x["x"].double().chunk(2, -1)
    if params["op"] == "silu_mul":
        act = gate * torch.sigmoid(gate)
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate**3)
        act = 0.5 * gate * (1 + torch.tanh(inner))
    want = act * up
    bound = want.abs() * (3 * u + 2.0**-20) + (gate * up).abs() * 2.0**-21 + least * (1 + up.abs())
    return judge_elements(tensors["y"], want, bound, "y")


def _turn(x: torch.Tensor, params: dict[str, Any], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated float64, sum of the magnitudes that were combined)."""
    R = params["R"]
    cos, sin = rope_table(params).double()[positions].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    part, rest = x[..., :R], x[..., R:]
    if params["interleaved"]:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        size = torch.stack((a.abs() + b.abs(),) * 2, -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        size = torch.cat((a.abs() + b.abs(),) * 2, -1)
    return torch.cat((turned, rest), -1), torch.cat((size, torch.zeros_like(rest)), -1)


def _rope(params: dict[str, Any], x: _Tensors, tensors: _Tensors, u: float, least: float) -> Judgement:
    want, size = _turn(x["x"].double(), params, x["positions"])
    return judge_elements(tensors["y"], want, want.abs() * u * 1.5 + size * 2.0**-21 + least, "y")


def _merge(params: dict[str, Any], x: _Tensors, tensors: _Tensors, u: float, least: float) -> Judgement:
    a, b = x["lse_a"].double(), x["lse_b"].double()
    want_lse = torch.logaddexp(a, b)
    wa = torch.where(torch.isneginf(a), 0.0, torch.exp(a - want_lse))
    wb = torch.where(torch.isneginf(b), 0.0, torch.exp(b - want_lse))
    pa = torch.where((wa > 0)[..., None], x["out_a"].double(), 0.0) * wa[..., None]
    pb = torch.where((wb > 0)[..., None], x["out_b"].double(), 0.0) * wb[..., None]
    want = pa + pb
    bound = want.abs() * 2 * u + (pa.abs() + pb.abs()) * 2.0**-19 + least
    verdict = judge_elements(tensors["y"], want, bound, "merged out")
    if not verdict.ok:
        return verdict
    lse = tensors["lse"].double()
    both = torch.isneginf(want_lse)
    if bool((torch.isneginf(lse) != both).any()):
        return Judgement(False, "merged lse: -inf exactly where both parts are empty")
    clean = torch.where(both, 0.0, want_lse)
    return judge_elements(torch.where(both, 0.0, lse), clean, 2.0**-20 * (1 + clean.abs()), "merged lse")


def _fused(params: dict[str, Any], x: _Tensors, tensors: _Tensors, u: float, least: float) -> Judgement:
    H, K, D, Dv = params["H"], params["K"], params["D"], params["Dv"]
    T, dtype = params["T"], x["qkv"].dtype
    q, k, v = torch.split(x["qkv"].double(), [H * D, K * D, K * Dv], -1)
    worst = 0.0
    found = {"q": (q.reshape(T, H, D), x["q_norm"]), "k": (k.reshape(T, K, D), x["k_norm"])}
    texts = layout_text(params)
    for name, (values, weight) in found.items():
        if params.get("norms", True):
            rms = torch.sqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)
            values = values / rms * (weight.double() + params.get("offset", 0.0))
        want, size = _turn(values, params, x["positions"]) if params["R"] else (values, values.abs())
        size = torch.maximum(size, want.abs())
        if name == "q":
            got = tensors["y"]
        elif params.get("no_cache"):
            continue
        else:
            got = gather(texts[0], tensors["k"], x["slots"], params["block"], K, D)
        verdict = judge_elements(got, want, size * (4 * u + 2.0**-20) + 4 * least, name)
        if not verdict.ok:
            return verdict
        worst = max(worst, verdict.margin or 0.0)
    if not params.get("no_cache"):
        got = gather(texts[1], tensors["v"], x["slots"], params["block"], K, Dv)
        if not torch.equal(bits(got), bits(v.reshape(T, K, Dv).to(dtype))):
            return Judgement(False, "the values in the cache are not the values given")
    for name, text, dim in zip("kv", texts, (D, Dv), strict=True):
        shape = plane_shape(text, params["blocks"], params["block"], K, dim, dtype.itemsize)
        marks = torch.zeros(shape, dtype=dtype)
        if not params.get("no_cache"):
            scatter(text, marks, x["slots"], torch.ones(T, K, dim, dtype=dtype), params["block"])
        touched = ~torch.isnan(tensors[name].float()) & (marks == 0)
        if bool(touched.any()):
            return Judgement(False, f"plane {name}: {int(touched.sum())} elements outside the slots were written")
    return Judgement(True, margin=worst)


_JUDGES = {
    "rms_norm": _norm, "add_rms_norm": _norm, "silu_mul": _gated, "gelu_tanh_mul": _gated, "rope": _rope,
    "merge_lse": _merge, "qk_norm_rope_write": _fused,
}  # fmt: skip
