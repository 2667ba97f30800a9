"""Cache writes: what the kernel stored, byte for byte, and what it left alone."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.harness.cachemaker import plane_texts
from dougong_compat.harness.call import Call
from dougong_compat.harness.guard import Surroundings
from dougong_compat.numbers import same_bits
from dougong_compat.problem import build
from dougong_compat.writing import incoming

__all__ = ["execute", "execute_roundtrip"]


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write tokens through the kernel; every plane's bytes before and after go to the parent."""
    problem = build(request["params"], request["seed"])
    call = Call(ctx, problem, declared=request.get("declared", True))
    message["provider"] = call.choice.candidate.label
    k, v, slots = incoming(problem, request["seed"])
    k, v, slots = (call.place(x) for x in (k, v, slots))
    if request["params"].get("packed"):
        k, v = _packed(k, v)
    before = {name: _bytes(plane) for name, plane in call.cache.planes.items()}
    beside = Surroundings(call.cache.planes.values())
    given = [k.clone(), v.clone(), slots.clone()]
    for _ in range(request["params"].get("times", 1)):
        call.kernel.write(call.layer, k, v, call.cache, slots)
    ctx.device.synchronize()
    for name, now, was in zip(("k", "v", "slots"), (k, v, slots), given, strict=True):
        if not same_bits(now.cpu(), was.cpu()):
            message["findings"].append(f"write changed its input {name}")
    message["findings"] += [text for text in [beside.finding()] if text]
    for name, plane in call.cache.planes.items():
        tensors[f"before_{name}"], tensors[f"after_{name}"] = before[name], _bytes(plane)
    assert set(call.cache.planes) == set(plane_texts(problem))


def _bytes(plane: torch.Tensor) -> torch.Tensor:
    """The plane's elements in index order, as stored."""
    flat = plane.detach().clone(memory_format=torch.contiguous_format).cpu()
    return flat.contiguous().view(torch.uint8).reshape(*plane.shape, plane.element_size())


def _packed(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices of packed rows, as a fused projection leaves them."""
    tokens = k.shape[0]
    a, b = k[0].numel() if tokens else 0, v[0].numel() if tokens else 0
    rows = torch.full((tokens, 16 + a + b), float("nan"), dtype=k.dtype, device=k.device)
    if not tokens:
        return k, v
    rows[:, 16 : 16 + a] = k.reshape(tokens, -1)
    rows[:, 16 + a :] = v.reshape(tokens, -1)
    return rows[:, 16 : 16 + a].view(k.shape), rows[:, 16 + a :].view(v.shape)


def execute_roundtrip(
    ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write whole rows in pieces through the kernel, then attend: a cache only the kernel has touched."""
    problem = build({**request["params"], "write": True}, request["seed"])
    pieces = request["params"].get("pieces", [3, 1, 8])
    call = Call(ctx, problem, declared=request.get("declared", True))
    message["provider"] = call.choice.candidate.label
    for row, kv_len in enumerate(problem.kv_lens):
        slots = problem.row_slots(row)
        start = problem.kv_at[row]
        at, turn = problem.first_live[row] * problem.block, 0
        while at < kv_len:
            end = min(kv_len, at + pieces[turn % len(pieces)])
            k, v = problem.k[start + at : start + end], problem.v[start + at : start + end]
            if problem.quantised:
                k = (k.float() * problem.params["k_scale"]).to(problem.dtype)
                v = (v.float() * problem.params["v_scale"]).to(problem.dtype)
            call.write(k, v, slots[at:end])
            at, turn = end, turn + 1
    out, lse = call.run(message["findings"])
    tensors["out"] = out
    if lse is not None:
        tensors["lse"] = lse
