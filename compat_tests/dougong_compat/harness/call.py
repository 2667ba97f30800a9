"""One attention call on the backend, set up hostilely and checked afterwards."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import (
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    GroupView,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    RaggedKV,
)
from dougong.hal.attention import Plan
from dougong_compat.harness.cachemaker import make_planes
from dougong_compat.harness.guard import Fenced, Watch
from dougong_compat.harness.memory import trapped_copy
from dougong_compat.problem import Problem

__all__ = ["Call", "spec_of"]


def spec_of(problem: Problem) -> AttentionSpec:
    """The problem's static half in the contract's words."""
    p = problem.params
    return AttentionSpec(
        num_heads=problem.H,
        num_kv_heads=problem.K,
        head_dim=problem.D,
        head_dim_v=problem.Dv,
        scale=problem.scale,
        causal=p["causal"],
        window=p["window"],
        softcap=p["softcap"],
        alibi=p["alibi"],
        sinks=p["sinks"],
        dtype=problem.dtype,
        kv_dtype=problem.kv_dtype,
        lse=p["lse"],
        latent=p["latent"],
    )


class Call:
    """A problem's tensors on the device, and one kernel with a plan. ``run`` may be called again after changes."""

    def __init__(self, ctx: Any, problem: Problem, *, declared: bool = True) -> None:
        self.problem, self.ctx = problem, ctx
        self.device: torch.device = ctx.device.torch_device
        p = problem.params
        self.spec = spec_of(problem)
        layout = ctx.layout(p)
        extra = p.get("limits", {})
        self.limits = Limits(
            max_rows=max(1, len(problem.q_lens) + extra.get("rows", 0)),
            max_tokens=max(1, problem.tokens + extra.get("tokens", 0)),
            max_kv_len=max([1, *problem.kv_lens]) + p["slack"] + extra.get("kv_len", 0),
            max_blocks=max(1, problem.table.shape[1] + extra.get("blocks", 0)),
        )
        query = AttentionQuery(
            spec=self.spec,
            layout=layout,
            block_size=max(1, problem.block),
            ragged=p["ragged"],
            batch_invariant=bool(p.get("batch_invariant", False)),
            strided=p["stride"] != "plain",
            max_kv_len=self.limits.max_kv_len,
        )
        self.choice = ctx.choose(query, declared)
        self.group = KVGroup(
            index=0, layers=(0,), spec=self.spec, layout=layout,
            manager_block=query.block_size * p["manager"], kernel_block=query.block_size,
        )  # fmt: skip
        self.kernel: AttentionKernel = self.choice.target(self.spec, self.group, self.limits, ctx.device)
        self.plan: Plan = self.kernel.new_plan()
        self.kv: LayerCache | RaggedKV = self._make_kv(layout)
        self.layer = self._layer()
        self.q = self._query()
        self.batch = self.make_batch(problem)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """A copy on the device; with guard pages, one that ends where the readable world does."""
        if self.problem.params["guard"] and self.device.type == "cpu":
            return trapped_copy(x)
        return x.to(self.device, copy=True)

    def _make_kv(self, layout: Any) -> LayerCache | RaggedKV:
        problem = self.problem
        if problem.params["ragged"]:
            cu = torch.tensor(problem.kv_at, dtype=torch.int32)
            return RaggedKV(self.place(problem.k), self.place(problem.v), cu.to(self.device), cu)
        return LayerCache(make_planes(problem, self.device), layout, problem.block, self.spec)

    def _layer(self) -> LayerArgs:
        p, problem = self.problem.params, self.problem
        scales: list[Any] = [p["k_scale"], p["v_scale"]]
        if p["scale_tensor"]:
            scales = [torch.tensor([value], dtype=torch.float32, device=self.device) for value in scales]
        return LayerArgs(
            k_scale=scales[0],
            v_scale=scales[1],
            sinks=None if problem.sinks is None else self.place(problem.sinks),
            slopes=None if problem.slopes is None else self.place(problem.slopes),
        )

    def _query(self) -> torch.Tensor:
        q = self.problem.q
        if not self.problem.params["q_pack"]:
            return self.place(q)
        # a slice of packed QKV rows; what lies beside it is poison
        T, H, D = q.shape
        width = H * D + 2 * self.problem.K * D
        packed = torch.full((T, width), float("nan"), dtype=q.dtype, device=self.device)
        view = packed[:, : H * D].view(T, H, D) if T else packed[:, : H * D].reshape(0, H, D)
        view.copy_(q)
        return view

    def make_batch(self, problem: Problem) -> BatchView:
        """The batch's view on the device."""
        cu = torch.tensor(problem.q_at, dtype=torch.int32)
        lens = torch.tensor(problem.kv_lens, dtype=torch.int32).reshape(len(problem.kv_lens))
        decode = 0
        while decode < len(problem.q_lens) and problem.q_lens[decode] == 1:
            decode += 1
        table = problem.table if problem.table.numel() else torch.zeros(len(problem.q_lens), 1, dtype=torch.int32)
        view = GroupView(
            kv_len=self.place(lens),
            host_kv_len=lens.clone() if problem.params["host_len"] else None,
            max_kv_len=max([0, *problem.kv_lens]) + problem.params["slack"],
            block_table=self.place(table),
            slots=self.place(problem.slots),
        )
        return BatchView(
            num_rows=len(problem.q_lens),
            num_tokens=problem.tokens,
            num_decode_rows=decode,
            max_q_len=max([0, *problem.q_lens]),
            cu_q=self.place(cu),
            host_cu_q=cu.clone(),
            groups=(view,),
        )

    def outputs(self) -> tuple[Fenced, Fenced | None]:
        """Fresh NaN-filled out and lse with guard words."""
        T, H = self.problem.tokens, self.problem.H
        out = Fenced((T, H, self.problem.Dv), self.problem.dtype, self.device)
        return out, Fenced((T, H), torch.float32, self.device) if self.problem.params["lse"] else None

    def watched(self) -> Watch:
        """All inputs of ``run``, to be compared afterwards."""
        view = self.batch.groups[0]
        inputs = {
            "q": self.q, "cu_q": self.batch.cu_q, "kv_len": view.kv_len, "block_table": view.block_table,
            "slots": view.slots, "host_cu_q": self.batch.host_cu_q,
        }  # fmt: skip
        if view.host_kv_len is not None:
            inputs["host_kv_len"] = view.host_kv_len
        if isinstance(self.kv, RaggedKV):
            inputs |= {"k": self.kv.k, "v": self.kv.v}
        else:
            inputs |= {f"cache plane {name}": plane for name, plane in self.kv.planes.items()}
        for name in ("sinks", "slopes", "k_scale", "v_scale"):
            value = getattr(self.layer, name)
            if isinstance(value, torch.Tensor):
                inputs[name] = value
        return Watch(inputs)

    @property
    def cache(self) -> LayerCache:
        """``kv``, where it is a cache."""
        assert isinstance(self.kv, LayerCache)
        return self.kv

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """The kernel's own write of k [T, K, D], v [T, K, Dv] (model dtype)."""
        self.kernel.write(self.layer, self.place(k), self.place(v), self.cache, self.place(slots))

    def run(self, findings: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Plan and run once; (out, lse) on the host. What the call broke is added to ``findings``."""
        out, lse = self.outputs()
        watch = self.watched()
        self.kernel.plan(self.batch, self.plan)
        self.kernel.run(self.plan, self.layer, self.q, self.kv, out=out.tensor, lse=None if lse is None else lse.tensor)
        self.ctx.device.synchronize()
        findings += [text for text in [out.finding("out"), lse.finding("lse") if lse else ""] if text]
        findings += watch.findings()
        return out.tensor.cpu(), None if lse is None else lse.tensor.cpu()
