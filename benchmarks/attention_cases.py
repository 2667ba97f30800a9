"""The cases that attention is timed in, and how: shared by attention.py and peers/attention.py.

dougong_kernels is imported late, so that a command can be parsed and explained where there is no Triton.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
if TYPE_CHECKING:
    from dougong_kernels.config import Settings

DEV = "cuda"
DECODE = "1:4096,1:65536,16:4096,64:2048,256:1024,256:4096"
PREFILL = "1:4096,1:8192,8:1024"


def parse(text: str, kind: str, heads: str) -> list[tuple[str, int, int, int, int]]:
    """(kind, rows, length, heads, kv heads) of ROWS:LENGTH[:HEADS/KV_HEADS],...; ``heads`` where none are given."""
    cases = []
    for row in filter(None, text.split(",")):
        rows, length, *given = row.split(":")
        h, k = (given or [heads])[0].split("/")
        if len(given) > 1:
            raise ValueError(f"{row} is not ROWS:LENGTH[:HEADS/KV_HEADS]")
        cases.append((kind, int(rows), int(length), int(h), int(k)))
    return cases


def target() -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def cores() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def bench(f: Any, iters: int, flush: torch.Tensor) -> float:
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    times = []
    for _ in range(iters):
        flush.zero_()
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    times.sort()
    return times[len(times) // 2]


class Case:
    """One row of the table: a paged cache as both peers keep it, and random blocks."""

    def __init__(
        self, kind: str, rows: int, length: int, heads: int, kv_heads: int, dim: int, page: int,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        from dougong_kernels.paged import Shape

        self.kind, self.rows, self.length, self.heads = kind, rows, length, heads
        self.q_len = 1 if kind == "decode" else length
        blocks = -(-length // page)
        bf16: Any = dict(device=DEV, dtype=torch.bfloat16, generator=generator)
        self.kv = torch.randn(rows * blocks, 2, page, kv_heads, dim, **bf16)
        self.k, self.v = self.kv[:, 0], self.kv[:, 1]
        self.table = torch.randperm(rows * blocks, device=DEV, generator=generator).int().view(rows, blocks)
        self.q = torch.randn(rows * self.q_len, heads, dim, **bf16)
        self.out = torch.empty_like(self.q)
        self.cu = torch.arange(rows + 1, device=DEV, dtype=torch.int32) * self.q_len
        self.host_cu = self.cu.cpu()
        self.kv_len = torch.full((rows,), length, device=DEV, dtype=torch.int32)
        self.shape = Shape(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, head_dim_v=dim, block_size=page, scale=dim**-0.5
        )
        self.work = (
            2 * rows * length * kv_heads * dim * 2 if kind == "decode" else 2 * rows * length * length * heads * dim
        )

    def make(self, settings: Settings, invariant: bool = False) -> Any:
        from dougong_kernels.paged import PagedAttention

        attention = PagedAttention(
            self.shape, max_rows=max(8, self.rows), max_tokens=self.q.shape[0], max_kv_len=self.length, cores=cores(),
            device=DEV, settings=settings, batch_invariant=invariant,
        )  # fmt: skip
        plan = attention.new_plan()
        again = lambda: attention.plan(  # noqa: E731
            plan, self.cu, self.kv_len, self.table, num_rows=self.rows, num_tokens=self.q.shape[0],
            max_q_len=self.q_len, host_cu_q=self.host_cu,
        )  # fmt: skip
        again()
        return (lambda: attention.run(plan, self.q, self.k, self.v, self.out)), again

    def error(self) -> float:
        """Relative error of the last query of the last row."""
        page = self.kv.shape[2]
        block = self.table[-1].long()
        group = self.heads // self.kv.shape[3]
        k = self.k[block].reshape(-1, *self.k.shape[2:])[: self.length].float().repeat_interleave(group, 1)
        v = self.v[block].reshape(-1, *self.v.shape[2:])[: self.length].float().repeat_interleave(group, 1)
        assert page
        s = torch.einsum("hd,nhd->hn", self.q[-1].float(), k) * self.shape.scale
        want = torch.einsum("hn,nhd->hd", torch.softmax(s, -1), v)
        return float((self.out[-1].float() - want).norm() / want.norm())

    def rate(self, us: float) -> float:
        return self.work / us / (1e3 if self.kind == "decode" else 1e6)


def graph_of(f: Any) -> Any:
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay
