#!/usr/bin/env python3
"""The fused ops on one GPU: equal to their references (--check), and how near copy bandwidth they run (--time).

Times are of a captured graph of 20 calls over rotating inputs, so that launches from the host do not count.

    python benchmarks/fused_ops.py --check --time
"""

# ruff: noqa: B023, E402 - every lambda is called before its loop goes on; paths come before imports
from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "core")]
from dougong.hal import HND, NHD, AttentionSpec, LayerArgs, LayerCache, QKVShape, RopeTable, allocate_cache
from dougong.hal.reference import ops as reference
from dougong.hal.reference import sampling
from dougong_kernels.ops import draw, gemv, pointwise, skinny, write

DEV = "cuda"
BF16 = torch.bfloat16
CALLS = 20


def graph_us(f: Callable[[int], Any], repeats: int = 20) -> float:
    """Median microseconds of one call, of a graph of CALLS calls; f gets the call's index to rotate its inputs."""
    for i in range(3):
        f(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            f(i)
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    times = []
    for _ in range(repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times)[len(times) // 2]


def ulps(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference in units of the last place of `want`'s dtype, at the row's scale."""
    got, want = got.double(), want.double()
    bad = torch.isnan(got) != torch.isnan(want)
    if bad.any():
        return float("inf")
    scale = want.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    return float(((got - want).abs() / scale).nan_to_num(0.0).max())


def check() -> list[str]:
    lines = []

    def say(name: str, good: bool, detail: str = "") -> None:
        print(json.dumps({"check": name, "ok": bool(good), "detail": detail}), flush=True)
        lines.append(f"{'ok  ' if good else 'FAIL'} {name} {detail}")

    def near(name: str, got: torch.Tensor, want: torch.Tensor, limit: float = 2**-7) -> None:
        error = ulps(got, want)
        same = float((got == want).float().mean())
        say(name, error <= limit and got.dtype == want.dtype, f"max {error:.1e} equal {same:.4f}")

    torch.manual_seed(1)
    for rows, size in ((1, 1024), (7, 4096), (300, 5120), (3, 80)):
        x, r, w = (torch.randn(rows, size, device=DEV).to(BF16) for _ in range(3))
        near(f"rms_norm {rows}x{size}", pointwise.rms_norm(x, w[0], 1e-6), reference.rms_norm(x, w[0], 1e-6))
        near(f"rms_norm offset {rows}", pointwise.rms_norm(x, w[0], 1e-6, 1.0), reference.rms_norm(x, w[0], 1e-6, 1.0))
        want = reference.add_rms_norm(x, r, w[0], 1e-6)
        got = pointwise.add_rms_norm(x.clone(), r.clone(), w[0], 1e-6)
        near(f"add_rms_norm {rows}", got[0], want[0])
        say(f"add_rms_norm sum {rows}", torch.equal(got[1], want[1]))
        near(f"silu_mul {rows}", pointwise.silu_mul(x), reference.silu_mul(x))
        near(f"gelu_tanh_mul {rows}", pointwise.gelu_tanh_mul(x), reference.gelu_tanh_mul(x))
    oa, ob = torch.randn(2, 9, 6, 128, device=DEV).to(BF16)
    la, lb = torch.randn(2, 9, 6, device=DEV)
    la[0], lb[:2], oa[0] = -torch.inf, -torch.inf, torch.nan
    for name, got, want in zip(
        ("out", "lse"), pointwise.merge_lse(oa, la, ob, lb), reference.merge_lse(oa, la, ob, lb), strict=True
    ):
        near(f"merge_lse {name}", torch.nan_to_num(got, neginf=-99.0), torch.nan_to_num(want, neginf=-99.0))
    for layout in (NHD, HND):
        for interleaved in (False, True):
            for dim, rotary, kv in (
                (128, 128, BF16),
                (64, 32, torch.int8),
                (96, 96, torch.float8_e4m3fn),
                (80, 20, BF16),
            ):
                for offset, norm in ((0.0, True), (1.0, True), (0.0, False)):
                    for tokens in (3, 130):
                        near_write(say, layout, interleaved, dim, rotary, kv, offset, norm, tokens)
    for vocabulary in (1000, 151936):
        logits = torch.randn(5, vocabulary, device=DEV) * 3
        heat = torch.tensor([0.0, 1.0, 0.7, 1.5, 1.0], device=DEV)
        seeds, positions = torch.arange(5, device=DEV), torch.arange(5, device=DEV) * 7
        k = torch.tensor([5, 3, 0, 40, 1], device=DEV)
        p = torch.tensor([0.5, 0.9, 0.3, 1.0, 0.2], device=DEV)
        m = torch.tensor([0, 0.1, 0, 0.05, 0], device=DEV)
        for name, args in (
            ("plain", (None, None, None)),
            ("k", (k, None, None)),
            ("p", (None, p, None)),
            ("kpm", (k, p, m)),
        ):
            got = draw.sample(logits.clone(), heat, *args, seeds, positions)
            want = sampling.sample(logits.clone(), heat, *args, seeds, positions)
            say(f"sample {name} {vocabulary}", torch.equal(got, want), f"{got.tolist()} {want.tolist()}")
    for tokens, inputs, outputs in (
        (1, 1024, 4096),
        (3, 3072, 1024),
        (16, 1024, 6144),
        (1, 2048, 100),
        (16, 3072, 1024),
        (9, 4096, 28672),
        (16, 5000, 50),
    ):
        x = torch.randn(tokens, inputs, device=DEV).to(BF16)
        w = torch.randn(outputs, inputs, device=DEV).to(BF16)
        bias = torch.randn(outputs, device=DEV).to(BF16)
        want = (x.double() @ w.double().T + bias.double()).to(BF16)
        near(f"gemv {tokens}x{inputs}->{outputs}", gemv.linear(x, w, bias), want)
        if tokens > 1:
            product = skinny.Skinny(outputs, inputs, BF16, x.device)
            for turn in range(3):
                near(f"few rows {tokens}x{inputs}->{outputs}, turn {turn}", product(x, w, bias), want)
    return lines


def near_write(say: Any, layout: Any, interleaved: bool, dim: int, rotary: int, kv: torch.dtype, offset: float,
               norm: bool, tokens: int) -> None:  # fmt: skip
    heads, kv_heads = 16, 8
    table = RopeTable(torch.randn(500, rotary, device=DEV), interleaved)
    weights = [torch.randn(dim, device=DEV).to(BF16) if norm else None for _ in range(2)]
    shape = QKVShape(heads, kv_heads, dim, dim, *weights, norm_offset=offset)
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, kv_dtype=kv)
    first = allocate_cache(spec, layout, 40, 16, DEV)
    for plane in first.planes.values():
        plane.view(torch.uint8).fill_(7)
    second = LayerCache({n: x.clone() for n, x in first.planes.items()}, layout, 16, spec)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=DEV).to(BF16)
    positions = torch.randint(0, 500, (tokens,), device=DEV)
    slots = torch.randperm(640, device=DEV)[:tokens]
    layer = LayerArgs(0.02, torch.tensor([0.03], device=DEV))
    want = reference.qk_norm_rope_write(qkv.clone(), shape, table, positions, layer, first, slots)
    got = write.qk_norm_rope_write(qkv.clone(), shape, table, positions, layer, second, slots)
    same = []
    worst = 0.0
    for name in ("k", "v"):
        a, b = first.planes[name].view(torch.uint8), second.planes[name].view(torch.uint8)
        same.append(float((a == b).float().mean()))
        worst = max(worst, ulps(second.planes[name].float().flatten(1), first.planes[name].float().flatten(1)))
    error = ulps(got, want)
    good = error <= 2**-6 and same[1] == 1.0 and same[0] > 0.99 and worst <= 2**-3
    style = "gptj" if interleaved else "neox"
    name = f"qkv {layout.name} {style} d{dim}/{rotary} {str(kv)[6:]} +{offset} norm={norm} T{tokens}"
    if not good or tokens == 3:
        say(name, good, f"q {error:.1e} k {same[0]:.5f} v {same[1]:.5f} worst {worst:.1e}")


def timed(a: argparse.Namespace) -> list[str]:
    lines = []
    big = torch.empty(1 << 29, dtype=torch.int8, device=DEV)
    other = torch.empty_like(big)
    copy = 2 * big.numel() / graph_us(lambda i: other.copy_(big)) / 1e3
    lines.append(f"copy bandwidth {copy:.0f} GB/s")

    def row(name: str, us: float, moved: int, ref_us: float | None = None) -> None:
        rate = moved / us / 1e3
        print(
            json.dumps(
                dict(
                    op=name,
                    us=round(us, 2),
                    GB_s=round(rate, 1),
                    share=round(rate / copy, 3),
                    torch_us=ref_us and round(ref_us, 2),
                )
            ),
            flush=True,
        )
        lines.append(f"{name:44s}{us:9.2f} us {rate:8.1f} GB/s" + (f"   torch {ref_us:9.2f} us" if ref_us else ""))

    for tokens in (1, 16, 256, 8192):
        for size in (1024, 4096):
            xs = [torch.randn(tokens, size, device=DEV).to(BF16) for _ in range(CALLS)]
            r, w = torch.randn_like(xs[0]), torch.randn(size, device=DEV).to(BF16)
            row(f"rms_norm {tokens}x{size}", graph_us(lambda i: pointwise.rms_norm(xs[i], w, 1e-6)), 4 * tokens * size)
            row(
                f"add_rms_norm {tokens}x{size}",
                graph_us(lambda i: pointwise.add_rms_norm(xs[i], r, w, 1e-6)),
                8 * tokens * size,
            )
        for size in (3072, 14336):
            g = torch.randn(tokens, 2 * size, device=DEV).to(BF16)
            row(f"silu_mul {tokens}x{size}", graph_us(lambda i: pointwise.silu_mul(g)), 6 * tokens * size)
        for heads, kv_heads, norm in ((16, 8, True), (32, 8, False)):
            spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=128)
            cache = allocate_cache(spec, NHD, 1024, 16, DEV)
            weights = [torch.randn(128, device=DEV).to(BF16) if norm else None for _ in range(2)]
            shape = QKVShape(heads, kv_heads, 128, 128, *weights)
            table = RopeTable(torch.randn(9000, 128, device=DEV))
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * 128, device=DEV).to(BF16)
            at, slots, layer = torch.arange(tokens, device=DEV), torch.randperm(16384, device=DEV)[:tokens], LayerArgs()
            us = graph_us(lambda i: write.qk_norm_rope_write(qkv, shape, table, at, layer, cache, slots))
            row(f"qk_norm_rope_write {tokens} {heads}/{kv_heads} norm={norm}", us, 4 * qkv.numel())
    for rows in (1, 16, 256):
        logits = torch.randn(rows, 151936, device=DEV)
        heat, greedy = torch.ones(rows, device=DEV), torch.zeros(rows, device=DEV)
        seeds = torch.arange(rows, device=DEV)
        k, p = torch.full((rows,), 50, device=DEV), torch.full((rows,), 0.9, device=DEV)
        size = 4 * logits.numel()
        row(
            f"sample greedy {rows}",
            graph_us(lambda i: draw.sample(logits, greedy, None, None, None, seeds, seeds)),
            size,
            graph_us(lambda i: logits.argmax(-1)),
        )
        row(
            f"sample gumbel {rows}", graph_us(lambda i: draw.sample(logits, heat, None, None, None, seeds, seeds)), size
        )
        row(
            f"sample top-k top-p {rows}",
            graph_us(lambda i: draw.sample(logits, heat, k, p, None, seeds, seeds), 5),
            size,
        )
    for tokens in (1, 2, 4, 8, 16):
        for inputs, outputs in (
            (1024, 4096),
            (2048, 1024),
            (1024, 6144),
            (3072, 1024),
            (1024, 151936),
            (4096, 6144),
            (4096, 28672),
            (14336, 4096),
        ):
            copies = max(2, min(CALLS, (300 << 20) // (2 * inputs * outputs)))
            ws = [torch.randn(outputs, inputs, device=DEV).to(BF16) for _ in range(copies)]
            x = torch.randn(tokens, inputs, device=DEV).to(BF16)
            product: Any = gemv.linear
            if tokens > 1:
                product = skinny.Skinny(outputs, inputs, BF16, x.device)
            us = graph_us(lambda i: product(x, ws[i % copies], None))
            row(
                f"gemv {tokens} {inputs}->{outputs}",
                us,
                2 * inputs * outputs,
                graph_us(lambda i: torch.nn.functional.linear(x, ws[i % copies])),
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    a = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(dict(device=torch.cuda.get_device_name(), torch=torch.__version__)))
    lines = []
    for wanted, step in ((a.check, check), (a.time, lambda: timed(a))):
        if not wanted:
            continue
        begin = time.perf_counter()
        try:
            lines += step()
        except Exception as error:
            traceback.print_exc()
            lines.append(f"ERROR {type(error).__name__}: {str(error)[:300]}")
        lines.append(f"({time.perf_counter() - begin:.0f} s)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
