"""L4: the same work again, in other company, under load; leaks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from dougong_compat.execute.attention import run_problem
from dougong_compat.harness.call import Call
from dougong_compat.numbers import same_bits
from dougong_compat.problem import build

__all__ = ["execute"]

_Checks = Iterator[tuple[str, bool]]


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    check = globals()[f"_{request['params']['check']}"]
    message["checks"] = [[what, bool(held)] for what, held in check(ctx, request, message)]


def _rerun(ctx: Any, request: dict[str, Any], message: dict[str, Any]) -> _Checks:
    """The same call ``times`` times in fresh memory: the same bits."""
    problem = build(request["params"], request["seed"])
    first, _ = run_problem(ctx, problem, message, declared=True)
    for turn in range(request["params"].get("times", 4)):
        junk = torch.full((1 << 14,), float("nan"), device=ctx.device.torch_device)  # other memory beneath the next run
        again, _ = run_problem(ctx, problem, message, declared=True)
        yield f"run {turn + 2} gives the bits of run 1", same_bits(first, again)
        del junk


def _replan(ctx: Any, request: dict[str, Any], message: dict[str, Any]) -> _Checks:
    """One kernel and one plan, run many times with the plan made once or made anew."""
    problem = build(request["params"], request["seed"])
    call = Call(ctx, problem)
    message["provider"] = call.choice.candidate.label
    first, _ = call.run(message["findings"])
    for turn in range(request["params"].get("times", 4)):
        again, _ = call.run(message["findings"])
        yield f"plan and run {turn + 2}", same_bits(first, again)
    for turn in range(3):  # one plan serves every layer
        out, lse = call.outputs()
        call.kernel.run(call.plan, call.layer, call.q, call.kv, out=out.tensor, lse=None if lse is None else lse.tensor)
        ctx.device.synchronize()
        yield f"layer {turn + 2} on the same plan", same_bits(first, out.tensor.cpu())


def _two_plans(ctx: Any, request: dict[str, Any], message: dict[str, Any]) -> _Checks:
    """Two plans of one kernel in flight: each keeps its own batch."""
    problem = build(request["params"], request["seed"])
    other = build({**request["params"], "page_seed": 4}, request["seed"] + 1)
    call = Call(ctx, problem)
    message["provider"] = call.choice.candidate.label
    alone, _ = call.run(message["findings"])
    second = call.kernel.new_plan()
    call.kernel.plan(call.batch, call.plan)
    call.kernel.plan(call.make_batch(other), second)
    out, lse = call.outputs()
    call.kernel.run(call.plan, call.layer, call.q, call.kv, out=out.tensor, lse=None if lse is None else lse.tensor)
    ctx.device.synchronize()
    yield "the first plan is its own after a second was made", same_bits(alone, out.tensor.cpu())


def _leak(ctx: Any, request: dict[str, Any], message: dict[str, Any]) -> _Checks:
    """Many calls leave nothing behind: no tensors, and no device memory where torch's allocator counts it.

    Bytes count as a leak if they grow in both halves of the calls: what is kept once, a workspace say, shows in one.
    """
    problem = build(request["params"], request["seed"])

    def left(calls: int) -> tuple[int, int | None]:
        for _ in range(calls):
            run_problem(ctx, problem, message, declared=True)
        ctx.device.synchronize()
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor), _allocated(ctx.device)

    before, middle, after = left(3), left(10), left(10)
    tensors = after[0] - before[0]
    yield f"{tensors} more tensors after 20 calls", tensors <= 4
    if before[1] is not None and middle[1] is not None and after[1] is not None:
        first, second = middle[1] - before[1], after[1] - middle[1]
        yield f"{first} more bytes on the device after 10 calls and {second} after 10 more", min(first, second) <= 0


def _allocated(device: Any) -> int | None:
    """Bytes that torch's allocator has given out on the device in this process, or None where it does not count them
    (the host's). Memory that kernels take past it is not among them; what other workers take is not either."""
    try:
        count = device.module.memory_allocated
    except (AttributeError, RuntimeError):  # the latter: torch knows no module of this device
        return None
    return int(count(device.index))


def _side_stream(ctx: Any, request: dict[str, Any], message: dict[str, Any]) -> _Checks:
    """A call on a side stream behind slow work waits for its inputs."""
    problem = build(request["params"], request["seed"])
    call = Call(ctx, problem)
    message["provider"] = call.choice.candidate.label
    want, _ = call.run(message["findings"])
    stream = ctx.device.new_stream()
    for turn in range(3):
        call.q.zero_()
        ctx.device.synchronize()
        out, lse = call.outputs()
        ctx.device.synchronize()
        with ctx.device.stream(stream):
            slow = torch.ones(256, 256, device=call.device)
            for _ in range(8):
                slow = slow @ slow / 256
            call.q.copy_(problem.q.to(call.device) + (slow[0, 0] * 0).to(problem.dtype))
            call.kernel.plan(call.batch, call.plan)
            call.kernel.run(
                call.plan, call.layer, call.q, call.kv, out=out.tensor, lse=None if lse is None else lse.tensor
            )
        ctx.device.synchronize()
        yield f"turn {turn}", same_bits(want, out.tensor.cpu())
