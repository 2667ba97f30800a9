"""A random paged problem with poison everywhere a kernel must not look, and its answer in float64.

Shared by the tests and the benchmarks' --check; no serving code imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dougong_kernels.paged import PagedAttention, PagedPlan, Shape

__all__ = ["Problem", "make_problem", "reference", "relative_error"]


@dataclass
class Problem:
    shape: Shape
    q_lens: list[int]
    kv_lens: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    cu_q: torch.Tensor
    kv_len: torch.Tensor
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None
    k_scale: float | torch.Tensor
    v_scale: float | torch.Tensor
    kv_start: torch.Tensor | None

    def run(self, attention: PagedAttention, plan: PagedPlan | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Plan and run into NaN-filled outputs; fails when a guard token behind the outputs changes."""
        s = self.shape
        tokens = self.q.shape[0]
        out = torch.full(
            (tokens + 2, s.num_heads, s.head_dim_v), float("nan"), dtype=self.q.dtype, device=self.q.device
        )
        lse = torch.full((tokens, s.num_heads), float("nan"), device=self.q.device) if s.lse else None
        plan = plan or attention.new_plan()
        self.plan(attention, plan)
        self.launch(attention, plan, out[:tokens], lse)
        assert torch.isnan(out[tokens:]).all(), "wrote past the last token"
        return out[:tokens], lse

    def plan(self, attention: PagedAttention, plan: PagedPlan) -> None:
        attention.plan(
            plan, self.cu_q, self.kv_len, self.table, num_rows=len(self.q_lens), num_tokens=self.q.shape[0],
            max_q_len=max(self.q_lens, default=0), host_cu_q=self.cu_q.cpu(),
        )  # fmt: skip

    def launch(
        self, attention: PagedAttention, plan: PagedPlan, out: torch.Tensor, lse: torch.Tensor | None = None
    ) -> None:
        attention.run(
            plan, self.q, self.k, self.v, out, lse, kv_start=self.kv_start, k_scale=self.k_scale,
            v_scale=self.v_scale, sinks=self.sinks, slopes=self.slopes,
        )  # fmt: skip


def make_problem(
    shape: Shape,
    q_lens: list[int],
    kv_lens: list[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    device: str = "cuda",
    seed: int = 0,
    tensor_scales: bool = False,
    poison: bool = True,
) -> Problem:
    """Blocks in random order; unwritten slots NaN (or the largest code), table tails huge, q a slice of packed QKV."""
    s = shape
    gen = torch.Generator(device=device).manual_seed(seed)
    kv_dtype = kv_dtype or dtype
    rows, n = len(q_lens), s.block_size
    heads, dim = s.num_kv_heads, s.head_dim
    cu = torch.zeros(rows + 1, dtype=torch.int32)
    cu[1:] = torch.tensor(q_lens, dtype=torch.int32).cumsum(0)
    tokens = int(cu[-1])

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=gen, dtype=torch.float32)

    k_scale: float | torch.Tensor = 1.0
    v_scale: float | torch.Tensor = 1.0
    if kv_dtype != dtype:
        k_scale, v_scale = (0.02, 0.03) if kv_dtype == torch.int8 else (0.5, 0.25)
        if tensor_scales:
            k_scale, v_scale = torch.tensor([k_scale], device=device), torch.tensor([v_scale], device=device)

    def store(x: torch.Tensor, scale: Any) -> torch.Tensor:
        if kv_dtype == dtype:
            return x.to(dtype)
        x = x / scale
        return x.round().clamp(-127, 127).to(torch.int8) if kv_dtype == torch.int8 else x.to(kv_dtype)

    start = None
    if n:
        width = max((-(-length // n) for length in kv_lens), default=0) + 2
        blocks = rows * width + 1
        table = torch.randperm(blocks - 1, device=device, generator=gen)[: rows * width].add(1).int().view(rows, width)
        whole = torch.full((blocks, 2, n, heads, dim), 127.0 if kv_dtype == torch.int8 else float("nan"), device=device)
        if not poison:
            whole.zero_()
        for b, length in enumerate(kv_lens):
            place = torch.arange(length, device=device)
            block = table[b, place // n].long()
            whole[block, 0, place % n] = store(draw(length, heads, dim), k_scale).float()
            whole[block, 1, place % n] = store(draw(length, heads, dim), v_scale).float()
            table[b, -(-length // n) :] = 2**30 + 7
        whole = whole.to(kv_dtype)
        k, v = whole[:, 0], whole[:, 1, ..., : s.head_dim_v]
    else:
        table = torch.zeros(rows, 1, dtype=torch.int32, device=device)
        start = torch.zeros(rows + 1, dtype=torch.int32)
        start[1:] = torch.tensor(kv_lens, dtype=torch.int32).cumsum(0)
        k = store(draw(int(start[-1]), heads, dim), k_scale)
        v = store(draw(int(start[-1]), heads, s.head_dim_v), v_scale)
        start = start[:-1].to(device)
    if s.latent:
        v = k[..., : s.head_dim_v]
    packed = draw(tokens, s.num_heads + 2 * heads, dim).to(dtype)
    return Problem(
        shape=s, q_lens=q_lens, kv_lens=kv_lens, q=packed[:, : s.num_heads], k=k, v=v, table=table,
        cu_q=cu.to(device), kv_len=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        sinks=draw(s.num_heads) if s.sinks else None,
        slopes=torch.rand(s.num_heads, device=device, generator=gen) * 0.2 if s.alibi else None,
        k_scale=k_scale, v_scale=v_scale, kv_start=start,
    )  # fmt: skip


def reference(p: Problem, rows: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, H, Dv] and lse [T, H] in float64 by the attention contract, row by row without any paging tricks."""
    s = p.shape
    device = p.q.device
    out = torch.zeros(p.q.shape[0], s.num_heads, s.head_dim_v, dtype=torch.float64, device=device)
    lse = torch.full((p.q.shape[0], s.num_heads), -float("inf"), dtype=torch.float64, device=device)
    cu = p.cu_q.tolist()
    group = s.num_heads // s.num_kv_heads
    for b, (q_len, length) in enumerate(zip(p.q_lens, p.kv_lens, strict=True)):
        if not q_len or not length or (rows is not None and b not in rows):
            continue
        place = torch.arange(length, device=device)
        if s.block_size:
            block = p.table[b, place // s.block_size].long()
            k, v = p.k[block, place % s.block_size], p.v[block, place % s.block_size]
        else:
            assert p.kv_start is not None
            first = int(p.kv_start[b])
            k, v = p.k[first : first + length], p.v[first : first + length]
        k = (k.float().double() * p.k_scale).repeat_interleave(group, 1)
        v = (v.float().double() * p.v_scale).repeat_interleave(group, 1)
        position = length - q_len + torch.arange(q_len, device=device)
        scores = torch.einsum("thd,nhd->htn", p.q[cu[b] : cu[b + 1]].double(), k) * s.scale
        if s.softcap:
            scores = s.softcap * torch.tanh(scores / s.softcap)
        distance = place[None, :] - position[:, None]
        if p.slopes is not None:
            scores = scores + p.slopes.double()[:, None, None] * distance
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if s.causal:
            hidden |= distance > 0
        if s.window:
            hidden |= distance.abs() >= s.window
        scores = scores.masked_fill(hidden, -float("inf"))
        total = torch.logsumexp(scores, -1)
        lse[cu[b] : cu[b + 1]] = total.T
        if p.sinks is not None:
            total = torch.logaddexp(total, p.sinks.double()[:, None])
        weights = torch.exp(scores - total[..., None]).nan_to_num(0.0)
        out[cu[b] : cu[b + 1]] = torch.einsum("htn,nhd->thd", weights, v)
    return out, lse


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖; NaN where `got` has one. Infinities must stand at the same places."""
    got = got.double()
    if not torch.equal(torch.isinf(got), torch.isinf(want)):
        return float("inf")
    finite = ~torch.isinf(want)
    difference = (got - want)[finite].norm()
    return float(difference / want[finite].norm().clamp_min(1e-30))
