#!/usr/bin/env python3
"""Paged attention on one GPU: is it right (--check), how fast (--time), which settings are best (--tune).

Prints JSON lines, then a short table. L2 is flushed between timed runs; figures are medians. Decode counts the bytes of
K and V that must be read, prefill half of the full product's operations (causal).

    python benchmarks/attention.py --check --time
    python benchmarks/attention.py --tune --write kernels/dougong_kernels/tuning/sm90.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_cases import DECODE, DEV, PREFILL, Case, bench, cores, graph_of, parse, target  # sets the path, too

from dougong_kernels.config import ExtendConfig, Settings, SplitConfig, configs_for
from dougong_kernels.paged import PagedAttention, Shape
from dougong_kernels.testing import make_problem, reference, relative_error

PEERS = {  # the better of FA3 and FlashInfer, measured on one H100 80GB: GB/s and TFLOP/s
    ("decode", 1, 4096, 32): 564, ("decode", 1, 65536, 32): 1946, ("decode", 16, 4096, 32): 1616,
    ("decode", 64, 2048, 32): 2234, ("decode", 256, 1024, 32): 2460, ("decode", 256, 4096, 32): 2979,
    ("decode", 64, 4096, 16): 2713, ("prefill", 1, 4096, 32): 464, ("prefill", 1, 8192, 32): 582,
    ("prefill", 8, 1024, 32): 265,
}  # fmt: skip


def rows_of(a: argparse.Namespace) -> list[tuple[str, int, int, int, int]]:
    rows = parse(a.decode, "decode", "32/8")
    if "64:4096" not in a.decode and a.decode:
        rows += parse("64:4096", "decode", "16/8")
    return rows + parse(a.prefill, "prefill", "32/8")


def settings_of(kind: str, config: Any) -> Settings:
    """One candidate, everything else as it is."""
    if kind == "decode":
        return Settings(config, configs_for(target(), 128).extend)
    return Settings(configs_for(target(), 128).split, config)


def _compile_one(job: tuple[str, Any, int]) -> str:
    kind, config, page = job
    try:
        case = Case(kind, 1, 256, 32, 8, 128, page)
        case.make(settings_of(kind, config))[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_all(jobs: list[tuple[str, Any, int]]) -> None:
    """Fill Triton's cache on disk from several processes, so that tuning waits for the GPU and not for the compiler."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=context) as pool:
        for error in pool.map(_compile_one, jobs):
            if error:
                print(json.dumps({"compile_error": error}), flush=True)


def time_rows(a: argparse.Namespace) -> list[str]:
    flush = torch.empty(128 << 20, dtype=torch.int8, device=DEV)
    settings = configs_for(target(), 128)
    table = []
    for kind, rows, length, heads, kv_heads in rows_of(a):
        try:
            case = Case(kind, rows, length, heads, kv_heads, 128, a.page)
            run, again = case.make(settings)
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first = time.perf_counter() - begin
            error = case.error()
            us = bench(run, a.iters, flush)
            graph = bench(graph_of(run), a.iters, flush)
            plan_us = bench(graph_of(again), a.iters, flush)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(10):
                run()
            host = (time.perf_counter() - begin) * 1e5
            torch.cuda.synchronize()
            peer = PEERS.get((kind, rows, length, heads))
            row = dict(
                kind=kind, batch=rows, ctx=length, hq=heads, hkv=kv_heads, page=a.page, us_p50=round(us, 2),
                graph_us=round(graph, 2), plan_us=round(plan_us, 2), host_us=round(host, 1),
                rate=round(case.rate(us), 1), graph_rate=round(case.rate(graph), 1),
                unit="GB/s" if kind == "decode" else "TFLOP/s", error=round(error, 6),
                first_s=round(first, 2), peer=peer,
            )  # fmt: skip
            if kind == "decode" and a.invariant:
                fixed, _ = case.make(settings, invariant=True)
                row["invariant_us"] = round(bench(fixed, a.iters, flush), 2)
            print(json.dumps(row), flush=True)
            ratio = f"{case.rate(min(us, graph)) / peer:5.2f}x" if peer else "     -"
            table.append(
                f"{kind:8s}{rows:5d} x{length:6d} {heads}/{kv_heads} {us:9.1f} us  graph {graph:9.1f}  "
                f"{case.rate(graph):8.1f} {row['unit']}  peer {peer} {ratio} err {error:.1e} "
                f"plan {plan_us:.1f} host {host:.0f}"
            )
            del case, run, again
        except Exception as error:
            traceback.print_exc()
            table.append(f"{kind} {rows} x {length}: {type(error).__name__}: {str(error)[:120]}")
    return table


def split_candidates() -> list[SplitConfig]:
    shapes = [(1, 64, 4, 5), (1, 64, 4, 7), (2, 64, 4, 5), (2, 64, 4, 7), (4, 64, 4, 5), (4, 64, 4, 7), (1, 128, 4, 3),
              (4, 128, 4, 3), (4, 128, 4, 5), (1, 32, 4, 7), (1, 64, 2, 5), (4, 128, 8, 5)]  # fmt: skip
    plans = itertools.product(shapes, (1, 2, 3), (1, 2, 4, 8, 16))
    return [SplitConfig(h, c, w, s, p, u) for (h, c, w, s), p, u in plans]


def extend_candidates() -> list[ExtendConfig]:
    shapes = [(128, 64, 8, 3, 0), (128, 64, 8, 3, 128), (128, 64, 8, 5, 128), (128, 64, 8, 2, 128),
              (128, 64, 4, 3, 0), (64, 64, 4, 3, 168), (128, 32, 8, 5, 128), (128, 32, 4, 3, 0),
              (128, 128, 8, 3, 0)]  # fmt: skip
    return [ExtendConfig(*shape, outer) for shape in shapes for outer in (False, True)]


def tune(a: argparse.Namespace) -> list[str]:
    flush = torch.empty(128 << 20, dtype=torch.int8, device=DEV)
    table, deadline = [], time.monotonic() + a.budget
    splits, extends = split_candidates(), extend_candidates()
    if a.only == "decode":
        extends = []
    if a.only == "prefill":
        splits = []
    begin = time.perf_counter()
    shapes = {replace(c, per_core=1, min_units=1) for c in splits}
    compile_all([("decode", c, a.page) for c in shapes] + [("prefill", c, a.page) for c in extends])
    print(json.dumps({"compile_s": round(time.perf_counter() - begin, 1), "split": len(shapes)}), flush=True)
    score: dict[Any, list[float]] = {}
    for kind, rows, length, heads, kv_heads in rows_of(a):
        case = Case(kind, rows, length, heads, kv_heads, 128, a.page)
        peer = PEERS.get((kind, rows, length, heads), 1.0)
        found = []
        for config in splits if kind == "decode" else extends:
            if time.monotonic() > deadline:
                table.append("out of time")
                break
            try:
                run, _ = case.make(settings_of(kind, config))
                case.out.fill_(float("nan"))
                us = bench(graph_of(run), 9, flush)
                error = case.error()
                found.append((us, error, config))
                if error < 0.02:
                    score.setdefault(config, []).append(math.log(case.rate(us) / peer))
            except Exception as error:
                print(
                    json.dumps({"config": str(config), "error": f"{type(error).__name__} {str(error)[:120]}"}),
                    flush=True,
                )
        found.sort(key=lambda x: x[0])
        for us, error, config in found:
            print(json.dumps(dict(kind=kind, batch=rows, ctx=length, hq=heads, us=round(us, 2),
                                  rate=round(case.rate(us), 1),
                                  error=round(error, 5), config=str(config))), flush=True)  # fmt: skip
        table.append(f"--- {kind} {rows} x {length} {heads}/{kv_heads}, peer {peer}")
        for us, error, config in found[: a.top]:
            shown = str(config).replace("SplitConfig", "").replace("ExtendConfig", "")
            table.append(f"{us:9.1f} us {case.rate(us):8.1f} err {error:.0e} {shown}")
        del case
    best: dict[str, Any] = {}
    for name, cls in (("split", SplitConfig), ("extend", ExtendConfig)):
        ranked = sorted(((sum(x) / len(x), c) for c, x in score.items() if isinstance(c, cls)), key=lambda x: -x[0])
        for value, config in ranked[:5]:
            table.append(f"geomean vs peer {math.exp(value):.3f} {config}")
        if ranked:
            best[name] = ranked[0][1]
    if a.write and best:
        path = Path(a.write)
        whole = json.loads(path.read_text()) if path.exists() else {}
        entry = whole.setdefault("d128", {})
        for name, config in best.items():
            entry[name] = config.__dict__
        path.write_text(json.dumps(whole, indent=1) + "\n")
    return table


def check_cases() -> list[tuple[str, Shape, list[int], list[int], dict[str, Any]]]:
    def shape(h: int = 32, k: int = 8, d: int = 128, dv: int = 0, n: int = 16, **more: Any) -> Shape:
        return Shape(
            num_heads=h, num_kv_heads=k, head_dim=d, head_dim_v=dv or d, block_size=n, scale=d**-0.5, lse=True, **more
        )

    ones = [1] * 9
    lengths = [1, 15, 16, 17, 0, 777, 4096, 33, 2049]
    mixed_q, mixed_kv = [1, 1, 1, 0, 100, 257, 1, 40], [300, 0, 65, 0, 100, 1000, 1, 17]
    fp16 = {"dtype": torch.float16}
    f8, i8 = {"kv_dtype": torch.float8_e4m3fn}, {"kv_dtype": torch.int8}
    cases = [
        ("decode", shape(), ones, lengths, {}),
        ("mixed", shape(), mixed_q, mixed_kv, {}),
        ("drafts", shape(), [4, 8, 1, 5], [400, 8, 33, 2], {}),
        ("fp16", shape(), mixed_q, mixed_kv, fp16),
        ("fp32", shape(upcast=True, d=64), [1, 1, 40], [300, 0, 65], {"dtype": torch.float32}),
        ("d64 mha", shape(8, 8, 64), mixed_q, mixed_kv, {}),
        ("d256 page 64", shape(8, 2, 256, n=64), mixed_q, mixed_kv, {}),
        ("d96 g7 page 48", shape(14, 2, 96, n=48), mixed_q, mixed_kv, {}),
        ("d80 g3 page 544", shape(12, 4, 80, n=544), mixed_q, mixed_kv, {}),
        ("d72 dv 40 g12", shape(24, 2, 72, 40), mixed_q, mixed_kv, {}),
        ("d192 dv128", shape(16, 4, 192, 128), mixed_q, mixed_kv, {}),
        ("d32 g1 page 1", shape(4, 4, 32, n=1), mixed_q, mixed_kv, {}),
        ("window", shape(window=100), mixed_q, mixed_kv, {}),
        ("window decode", shape(window=128), ones, lengths, {}),
        ("softcap sinks alibi", shape(softcap=5.0, sinks=True, alibi=True), mixed_q, mixed_kv, {}),
        ("noncausal", shape(causal=False), mixed_q, mixed_kv, {}),
        ("noncausal window", shape(causal=False, window=30), mixed_q, mixed_kv, {}),
        ("fp8", shape(fp8=1), mixed_q, mixed_kv, f8),
        ("fp8 by bits", shape(fp8=2), mixed_q, mixed_kv, {**f8, "tensor_scales": True}),
        ("int8", shape(), mixed_q, mixed_kv, i8),
        ("latent", shape(16, 1, 576, 512, latent=True), [1, 1, 1, 20], [300, 0, 65, 20], {}),
        ("latent 128 heads", shape(128, 1, 576, 512, latent=True, n=64), [1, 1, 1, 20], [300, 0, 1065, 20], {}),
        ("ragged", shape(8, 2, 64, n=0, causal=False), [100, 1, 30], [100, 1, 30], {}),
        ("q longer than kv", shape(), [40, 3], [10, 1], {}),
    ]  # fmt: skip
    return cases


def check(a: argparse.Namespace) -> list[str]:
    lines, runs = [], {}

    def prepare(case: Any) -> None:
        name, shape, q_lens, kv_lens, more = case
        wide = "kv_dtype" not in more
        exact = more.get("dtype") == torch.float32
        settings = configs_for(target(), shape.head_dim, latent=shape.latent, wide=wide, exact=exact)
        problem = make_problem(shape, q_lens, kv_lens, seed=len(name), **more)
        for invariant in (False, True):
            attention = PagedAttention(
                shape, max_rows=16, max_tokens=1024, max_kv_len=4096, cores=cores(), device=DEV, settings=settings,
                batch_invariant=invariant,
            )  # fmt: skip
            runs[name, invariant] = problem, attention, problem.run(attention)

    wanted = [c for c in check_cases() if not a.case or a.case in c[0]]
    for case in wanted:
        begin = time.perf_counter()
        try:
            prepare(case)
            torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            lines.append(f"ERROR {case[0]}: {type(error).__name__}: {str(error)[:150]}")
            continue
        for invariant in (False, True):
            problem, attention, (out, lse) = runs[case[0], invariant]
            want, want_lse = reference(problem)
            limit = {torch.float32: 1e-5, torch.float16: 2e-3}.get(problem.q.dtype, 1.2e-2)
            got = relative_error(out, want), relative_error(lse, want_lse)
            again, _ = problem.run(attention)
            good = got[0] < limit and got[1] < 1e-4 and torch.equal(out, again) and not int(attention.counters.sum())
            row = dict(check=case[0], invariant=invariant, error=got[0], lse_error=got[1],
                       rerun=torch.equal(out, again),
                       ok=bool(good), s=round(time.perf_counter() - begin, 1))  # fmt: skip
            print(json.dumps(row), flush=True)
            lines.append(f"{'ok  ' if good else 'FAIL'} {case[0]:22s} inv={invariant!s:5s} {got[0]:.1e} {got[1]:.1e}")
    if not a.case:
        for special in (check_invariance, check_graph):
            try:
                lines.append(special())
            except Exception as error:
                traceback.print_exc()
                lines.append(f"ERROR {special.__name__}: {type(error).__name__}: {str(error)[:150]}")
    return lines


def check_invariance() -> str:
    """Each row alone gives the bits it gives in the batch."""
    shape = check_cases()[0][1]
    settings = configs_for(target(), 128)
    attention = PagedAttention(
        shape, max_rows=16, max_tokens=1024, max_kv_len=4096, cores=cores(), device=DEV, settings=settings,
        batch_invariant=True,
    )  # fmt: skip
    problem = make_problem(shape, [1, 1, 1, 77], [4000, 100, 1500, 600])
    whole, _ = problem.run(attention)
    cu = problem.cu_q.tolist()
    same = True
    for b in range(4):
        alone = replace(
            problem, q_lens=[problem.q_lens[b]], kv_lens=[problem.kv_lens[b]], q=problem.q[cu[b] : cu[b + 1]],
            table=problem.table[b : b + 1], cu_q=problem.cu_q[b : b + 2] - cu[b], kv_len=problem.kv_len[b : b + 1],
        )  # fmt: skip
        same &= torch.equal(alone.run(attention)[0], whole[cu[b] : cu[b + 1]])
    return f"{'ok  ' if same else 'FAIL'} batch invariance, bit for bit"


def check_graph() -> str:
    """A captured mixed batch, replayed with other lengths, composition and another block table."""
    shape = check_cases()[0][1]
    settings = configs_for(target(), 128)
    attention = PagedAttention(
        shape, max_rows=16, max_tokens=1024, max_kv_len=8192, cores=cores(), device=DEV, settings=settings
    )
    plan = attention.new_plan()
    first = make_problem(shape, [1, 1, 60, 66], [40, 500, 60, 200])
    q = first.q.clone()
    k, v = first.k, first.v
    out = torch.empty(128, 32, 128, device=DEV, dtype=torch.bfloat16)
    lse = torch.empty(128, 32, device=DEV)
    first.plan(attention, plan)
    run = lambda: attention.run(plan, q, k, v, out, lse)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    bad = 0
    for seed, (q_lens, kv_lens) in enumerate(
        (([1, 1, 60, 66], [40, 500, 60, 200]), ([1, 1, 1, 125], [9, 40, 250, 125]))
    ):
        other = make_problem(shape, q_lens, kv_lens, seed=seed + 5)
        q.copy_(other.q)
        blocks = min(len(other.k), len(k))
        k[:blocks], v[:blocks] = other.k[:blocks], other.v[:blocks]
        assert len(other.k) <= len(k)
        out.fill_(float("nan"))
        other.plan(attention, plan)
        graph.replay()
        torch.cuda.synchronize()
        want, want_lse = reference(other)
        bad += not (relative_error(out, want) < 1.2e-2 and relative_error(lse, want_lse) < 1e-4)
    return f"{'FAIL' if bad else 'ok  '} graph replay with new lengths, rows and table"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", choices=("decode", "prefill"), help="tune one kernel only")
    parser.add_argument("--case", default="", help="check only cases whose name holds this")
    parser.add_argument("--decode", default=DECODE)
    parser.add_argument("--prefill", default=PREFILL)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--budget", type=float, default=150, help="seconds for --tune")
    parser.add_argument("--invariant", action="store_true", help="time the batch-invariant mode as well")
    parser.add_argument("--write", default="", help="put the best settings of --tune into this table")
    a = parser.parse_args()
    torch.manual_seed(0)
    print(
        json.dumps(dict(device=torch.cuda.get_device_name(), torch=torch.__version__, target=target(), cores=cores()))
    )
    lines = []
    for wanted, step in ((a.check, check), (a.tune, tune), (a.time, time_rows)):
        if wanted:
            begin = time.perf_counter()
            lines += [f"===== {step.__name__}", *step(a)]
            lines.append(f"({time.perf_counter() - begin:.0f} s)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
