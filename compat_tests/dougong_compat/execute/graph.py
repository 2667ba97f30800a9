"""One plan used again and again: by a captured graph's replay, or by plain calls (``eager``)."""

from __future__ import annotations

from typing import Any

import torch

from dougong_compat.execute.attention import new_tokens
from dougong_compat.execute.context import Refused
from dougong_compat.harness.cachemaker import plane_texts
from dougong_compat.harness.call import Call
from dougong_compat.harness.guard import Fenced, poison
from dougong_compat.harness.placement import scatter
from dougong_compat.problem import Problem
from dougong_compat.replays import replay_problems

__all__ = ["execute"]


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Plan and capture the first problem; for each other, change buffers in place, plan, update, replay.

    Fixed addresses throughout: q, the cache, out, lse, lengths, table and slots are written in place.
    """
    problems = replay_problems(request["params"], request["seed"])
    first = problems[0]
    call = Call(ctx, _roomy(problems), declared=request.get("declared", True))
    message["provider"] = call.choice.candidate.label
    eager = bool(request["params"].get("eager"))
    if not eager and (ctx.device.graphs is None or call.choice.spec.graph == "none"):
        raise Refused("its kernel is not captured in graphs")
    stage = _Stage(call, problems)
    stage.load(first)
    call.kernel.plan(stage.batch, call.plan)
    stage.launch()  # for a graph too: warm up outside the capture, as an engine does
    graph = None
    if not eager:
        graph = ctx.device.graphs.new(ctx.device.graphs.new_pool())
        with graph.capture():
            stage.launch()
    for turn, problem in enumerate(problems):
        stage.load(problem)
        call.kernel.plan(stage.batch, call.plan)
        if graph is None:
            stage.launch()
        else:
            if call.choice.spec.graph == "update":
                call.kernel.update_graph(graph, call.plan)
            graph.replay()
        ctx.device.synchronize()
        for name, fenced in (("out", stage.out), ("lse", stage.lse)):
            if fenced is None:
                continue
            finding = fenced.finding(name)
            if finding:
                message["findings"].append(f"replay {turn}: {finding}")
            tensors[f"{name}{turn}"] = fenced.tensor[: problem.tokens].cpu().clone()


def _roomy(problems: list[Problem]) -> Problem:
    """The first problem with table and limits wide enough for all of them."""
    first = problems[0]
    width = max(problem.table.shape[1] for problem in problems)
    blocks = max(problem.num_blocks for problem in problems)
    longest = max(max([1, *problem.kv_lens]) for problem in problems)
    first.params["limits"] = {"kv_len": max(0, longest - max([1, *first.kv_lens]))}
    table = torch.zeros(first.table.shape[0], width, dtype=torch.int32)
    table[:, : first.table.shape[1]] = first.table
    first.table, first.num_blocks = table, blocks
    return first


class _Stage:
    """Buffers that stay where they are while problems come and go."""

    def __init__(self, call: Call, problems: list[Problem]) -> None:
        self.call = call
        self.batch = call.batch
        first = problems[0]
        self.q = call.q
        self.out = Fenced((first.tokens, first.H, first.Dv), first.dtype, call.device)
        self.lse = Fenced((first.tokens, first.H), torch.float32, call.device) if first.params["lse"] else None
        self.longest = max(max([1, *problem.kv_lens]) for problem in problems)
        self.new_k, self.new_v = (x.to(call.device) for x in new_tokens(first))

    def load(self, problem: Problem) -> None:
        """Write a problem's tensors over the last one's."""
        call, view = self.call, self.batch.groups[0]
        self.q.copy_(problem.q)
        for plane in call.cache.planes.values():
            poison(plane, problem.params["tail"])
        for row, kv_len in enumerate(problem.kv_lens):
            slots = problem.row_slots(row)
            live = slots >= 0
            if problem.params["write"]:
                live &= torch.arange(kv_len) < kv_len - problem.q_lens[row]
            span = slice(problem.kv_at[row], problem.kv_at[row + 1])
            for name, (text, _, _) in plane_texts(problem).items():
                values = (problem.k if name == "k" else problem.v)[span]
                scatter(text, call.cache.planes[name], slots[live], values[live], problem.block)
        lens = torch.tensor(problem.kv_lens, dtype=torch.int32)
        view.kv_len.copy_(lens)
        view.host_kv_len = lens if problem.params["host_len"] else None
        view.max_kv_len = self.longest  # the graph's bound, whatever the rows hold
        table = torch.full(tuple(view.block_table.shape), 2**31 - 1, dtype=torch.int32)
        table[:, : problem.table.shape[1]] = problem.table
        view.block_table.copy_(table)
        view.slots.copy_(problem.slots)
        if problem.params["write"]:
            k, v = new_tokens(problem)
            self.new_k.copy_(k)
            self.new_v.copy_(v)
        self.out.tensor.fill_(float("nan"))
        if self.lse is not None:
            self.lse.tensor.fill_(float("nan"))

    def launch(self) -> None:
        call = self.call
        if call.problem.params["write"]:
            call.kernel.write(call.layer, self.new_k, self.new_v, call.cache, self.batch.groups[0].slots)
        call.kernel.run(
            call.plan, call.layer, self.q, call.kv, out=self.out.tensor,
            lse=None if self.lse is None else self.lse.tensor,
        )  # fmt: skip
