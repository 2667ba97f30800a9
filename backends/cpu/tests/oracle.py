"""A straightforward float64 reference of the attention contract, and the cases it is asked about.

It shares no paging code with the kernels: a case holds contiguous K and V per row and scatters them into a poisoned
cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.hal import HND, NHD, AttentionSpec, BatchView, KVGroup, LayerArgs, LayerCache, Limits

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LAYOUTS = {"nhd": NHD, "hnd": HND}


@dataclass
class Case:
    """One batch: ``rows`` are (q_len, kv_len)."""

    spec: AttentionSpec
    rows: list[tuple[int, int]]
    block: int = 16
    layout: str = "nhd"
    seed: int = 0
    q: torch.Tensor = field(init=False)
    keys: list[torch.Tensor] = field(init=False)
    values: list[torch.Tensor] = field(init=False)
    layer: LayerArgs = field(init=False)

    def __post_init__(self) -> None:
        spec, random = self.spec, torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float32)

        tokens = sum(q for q, _ in self.rows)
        self.q = normal(tokens, spec.num_heads, spec.head_dim).to(spec.dtype)
        quantised = spec.kv_dtype != spec.dtype
        self.keys = [store(normal(n, spec.num_kv_heads, spec.head_dim), spec) for _, n in self.rows]
        self.values = [store(normal(n, spec.num_kv_heads, spec.head_dim_v), spec) for _, n in self.rows]
        if spec.latent:
            self.values = [k[..., : spec.head_dim_v] for k in self.keys]
        self.layer = LayerArgs(
            k_scale=0.03 if quantised else 1.0,
            v_scale=0.05 if quantised else 1.0,
            sinks=normal(spec.num_heads) if spec.sinks else None,
            slopes=torch.rand(spec.num_heads, generator=random) * 0.2 if spec.alibi else None,
        )

    @property
    def group(self) -> KVGroup:
        return KVGroup(
            index=0, layers=(0,), spec=self.spec, layout=LAYOUTS[self.layout], manager_block=self.block,
            kernel_block=self.block,
        )  # fmt: skip

    @property
    def limits(self) -> Limits:
        return Limits(max_rows=64, max_tokens=4096, max_kv_len=65536, max_blocks=65536)

    def paged(self) -> tuple[LayerCache, BatchView]:
        """A cache of shuffled blocks, NaN where nothing was written, and a table with garbage past each row's end."""
        spec, size = self.spec, self.block
        needed = [-(-n // size) for _, n in self.rows]
        blocks = sum(needed) + 3
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(self.seed + 1)).int()
        table = torch.full((len(self.rows), max(needed, default=0) + 2), 2**31 - 1, dtype=torch.int32)
        planes = {name: poison(blocks, size, heads, dim, spec) for name, (heads, dim) in self._planes().items()}
        at = 0
        for row, (count, (_, n)) in enumerate(zip(needed, self.rows, strict=True)):
            table[row, :count] = order[at : at + count]
            at += count
            first = self._first_visible(row)
            table[row, : first // size] = 0  # freed behind the window
            place = torch.arange(n)
            block = table[row].long()[place // size]
            keep = place >= first
            planes["k"][block[keep], (place % size)[keep]] = self.keys[row][keep]
            if "v" in planes:
                planes["v"][block[keep], (place % size)[keep]] = self.values[row][keep]
        if self.layout == "hnd":
            planes = {name: plane.transpose(1, 2).contiguous() for name, plane in planes.items()}
        layout = LAYOUTS[self.layout]
        if spec.latent:
            layout = type(layout)("nhd", {"k": "b n h d"})
        cache = LayerCache(planes, layout, size, spec)
        q_lens, kv_lens = [q for q, _ in self.rows], [n for _, n in self.rows]
        slots = torch.zeros(sum(q_lens), dtype=torch.int64)
        return cache, BatchView.build(q_lens, kv_lens, table, size, "cpu", slots=slots)

    def _planes(self) -> dict[str, tuple[int, int]]:
        names = ("k",) if self.spec.latent else ("k", "v")
        return {name: self.spec.plane_dims(name) for name in names}

    def _first_visible(self, row: int) -> int:
        q_len, n = self.rows[row]
        if self.spec.window is None or not q_len:
            return 0
        return max(0, n - q_len - self.spec.window + 1)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(out [T, H, Dv], lse [T, H], largest |score|) in float64."""
        outs, lses, largest = [], [], 0.0
        at = 0
        for (q_len, _), k, v in zip(self.rows, self.keys, self.values, strict=True):
            out, lse, score = attend(self.spec, self.layer, self.q[at : at + q_len], k, v)
            at += q_len
            outs.append(out)
            lses.append(lse)
            largest = max(largest, score)
        return torch.cat(outs), torch.cat(lses), largest


def store(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    if spec.kv_dtype == torch.int8:
        return (x * 33).round().clamp(-127, 127).to(torch.int8)
    if spec.kv_dtype != spec.dtype:
        return (x * 30).to(spec.kv_dtype)
    return x.to(spec.kv_dtype)


def poison(blocks: int, size: int, heads: int, dim: int, spec: AttentionSpec) -> torch.Tensor:
    shape = (blocks, size, heads, dim)
    if spec.kv_dtype == torch.int8:
        return torch.full(shape, -128, dtype=torch.int8)
    if spec.kv_dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return torch.full(shape, math.nan, dtype=spec.kv_dtype)


def attend(
    spec: AttentionSpec, layer: LayerArgs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One row in float64."""
    q_len, n = q.shape[0], k.shape[0]
    kd = k.double() * float(layer.k_scale)
    vd = v.double() * float(layer.v_scale)
    group = spec.num_heads // spec.num_kv_heads
    out = torch.zeros(q_len, spec.num_heads, spec.head_dim_v, dtype=torch.float64)
    lse = torch.full((q_len, spec.num_heads), -math.inf, dtype=torch.float64)
    largest = 0.0
    key = torch.arange(n)
    for h in range(spec.num_heads):
        score = q[:, h].double() @ kd[:, h // group].T * spec.scale
        if spec.softcap:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        distance = key[None, :] - (n - q_len + torch.arange(q_len))[:, None]
        if layer.slopes is not None:
            score = score + float(layer.slopes[h]) * distance
        seen = torch.ones_like(distance, dtype=torch.bool)
        if spec.causal:
            seen &= distance <= 0
        if spec.window is not None:
            seen &= distance.abs() < spec.window
        score = score.masked_fill(~seen, -math.inf)
        for j in range(q_len):
            if not seen[j].any():
                continue
            largest = max(largest, float(score[j][seen[j]].abs().max()))
            lse[j, h] = torch.logsumexp(score[j], 0)
            total = lse[j, h]
            if layer.sinks is not None:
                total = torch.logaddexp(total, layer.sinks[h].double())
            out[j, h] = torch.exp(score[j] - total) @ vd[:, h // group]
    return out, lse, largest


def assert_close(case: Case, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """The conformance rule: per row ``|y - g| / |g| <= 4u + 2^-24 (32 + 4 max|s|)``, LSE within 2^-20 (1 + |LSE|)."""
    want, want_lse, largest = case.expected()
    bound = 4 * ROUNDOFF[case.spec.dtype] + 2.0**-24 * (32 + 4 * largest)
    assert not out.isnan().any()
    error = (out.double() - want).norm(dim=-1)
    size = want.norm(dim=-1)
    empty = size == 0
    assert bool((error[empty] == 0).all())
    worst = (error[~empty] / size[~empty]).max() if bool((~empty).any()) else torch.tensor(0.0)
    assert worst <= bound, f"error {float(worst):.3e} above {bound:.3e}"
    if lse is not None:
        blind = want_lse == -math.inf
        assert bool((lse[blind] == -math.inf).all())
        off = (lse.double() - want_lse)[~blind].abs()
        assert bool((off <= 2.0**-20 * (1 + want_lse[~blind].abs())).all()), float(off.max())


def kernel_for(case: Case) -> Any:
    from dougong_cpu.attention import CpuAttention
    from dougong_cpu.device import CpuDevice

    return CpuAttention(case.spec, case.group, case.limits, CpuDevice())


def run(case: Case, *, lse: bool = False, kernel: Any = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Through the plugin, into an output surrounded by guard words."""
    kernel = kernel or kernel_for(case)
    cache, batch = case.paged()
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    tokens, spec = case.q.shape[0], case.spec
    guarded = torch.full((tokens + 2, spec.num_heads, spec.head_dim_v), 12345.0, dtype=spec.dtype)
    guarded[1:-1] = math.nan
    out_lse = torch.full((tokens, spec.num_heads), math.nan) if lse else None
    before = case.q.clone()
    kernel.run(plan, case.layer, case.q, cache, out=guarded[1:-1], lse=out_lse)
    assert torch.equal(case.q, before)
    assert bool((guarded[0] == 12345.0).all()) and bool((guarded[-1] == 12345.0).all())
    return guarded[1:-1], out_lse
