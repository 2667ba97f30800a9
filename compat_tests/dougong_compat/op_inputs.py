"""Inputs of functional-op cases: the same in the parent and in the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dougong_compat.numbers import dtype_of

__all__ = ["make", "rope_table", "sample_inputs"]


def make(params: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Host tensors by name for ``params['op']``."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype_of(params["dtype"])

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * spread

    op, T = params["op"], params["T"]
    if op in ("rms_norm", "add_rms_norm"):
        E = params["E"]
        spread = params.get("spread", 1.0)
        x = {"x": normal(T, E, spread=spread).to(dtype), "weight": (normal(E) * 0.3 + 1).to(dtype)}
        if op == "add_rms_norm":
            x["residual"] = normal(T, E, spread=spread).to(dtype)
        return x
    if op in ("silu_mul", "gelu_tanh_mul"):
        return {"x": normal(T, 2 * params["E"], spread=params.get("spread", 2.0)).to(dtype)}
    if op == "rope":
        positions = torch.randint(0, params["positions"], (T,), generator=generator)
        if T:
            positions[-1] = params["positions"] - 1
        return {"x": normal(T, params["H"], params["D"]).to(dtype), "positions": positions}
    if op == "qk_norm_rope_write":
        H, K, D, Dv = params["H"], params["K"], params["D"], params["Dv"]
        blocks, block = params["blocks"], params["block"]
        slots = torch.randperm(blocks * block, generator=generator)[:T]
        return {
            "qkv": normal(T, (H + K) * D + K * Dv).to(dtype),
            "positions": torch.randint(0, 500, (T,), generator=generator),
            "slots": slots,
            "q_norm": (normal(D) * 0.3 + 1).to(dtype),
            "k_norm": (normal(D) * 0.3 + 1).to(dtype),
        }
    if op == "merge_lse":
        H, D = params["H"], params["D"]
        out = {name: normal(T, H, D).to(dtype) for name in ("out_a", "out_b")}
        lse = {name: normal(T, H, spread=params.get("spread", 5.0)) for name in ("lse_a", "lse_b")}
        empty = params.get("empty", "none")
        for side in "ab":
            gone = torch.zeros(T, H, dtype=torch.bool)
            if empty in (side, "both"):
                gone[:] = True
            elif empty == "mixed":
                gone = torch.rand(T, H, generator=generator) < 0.5
            lse[f"lse_{side}"][gone] = -torch.inf
            out[f"out_{side}"][gone] = float("nan")  # an empty part may hold anything
        return {**out, **lse}
    raise ValueError(f"unknown op {op!r}")


def rope_table(params: Mapping[str, Any]) -> torch.Tensor:
    """cos_sin [P, R] float32."""
    R = params["R"]
    count = params.get("positions", 512)
    inverse = 1.0 / 10000.0 ** (torch.arange(0, R, 2).double() / R)
    angle = torch.arange(count).double()[:, None] * inverse
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def sample_inputs(params: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """logits [R, V] and the per-row settings."""
    generator = torch.Generator().manual_seed(seed)
    R, V = params["R"], params["V"]
    logits = torch.randn(R, V, generator=generator) * params.get("spread", 3.0)
    if params.get("ties"):
        logits = logits.round()
    if params.get("masked"):
        logits[:, torch.randperm(V, generator=generator)[: V // 2]] = -torch.inf
    mode = params["mode"]
    temperature = torch.zeros(R) if mode == "greedy" else 0.3 + torch.rand(R, generator=generator)
    if mode == "mixed":
        temperature[::2] = 0.0
    out = {
        "logits": logits, "temperature": temperature,
        "seeds": torch.randint(0, 2**62, (R,), generator=generator),
        "positions": torch.randint(0, 10000, (R,), generator=generator),
    }  # fmt: skip
    if params.get("top_k"):
        out["top_k"] = torch.randint(0, min(V, 12) + 1, (R,), generator=generator)
    if params.get("top_p"):
        out["top_p"] = 0.2 + 0.8 * torch.rand(R, generator=generator)
    if params.get("min_p"):
        out["min_p"] = 0.3 * torch.rand(R, generator=generator)
    return out
