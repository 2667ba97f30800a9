#!/usr/bin/env python3
"""Paged attention of dougong beside FlashAttention 3 (vLLM's build) and FlashInfer: one process, the same tensors.

Each engine is called directly and replayed from a CUDA graph. In every case the engines take turns, so that they share
the GPU's clock and temperature. L2 is flushed before each run by writing so much memory that the host has made its call
before the device is through; a direct call that takes the host longer is marked. Plans and schedules are made before,
for just these lengths: no peer pays for a graph that would serve other lengths as well, as ours does. Each answer, of
the call and of the replay, is compared with torch's for the last query of the last row.

Prints a JSON line for each case and engine, then a table, the worst case first. A ratio is the best peer's time divided
by ours: above 1, ours is faster. Needs one NVIDIA GPU. A peer that is missing or fails is told, and the others go on;
the exit status is 1 where a case has no ratio.

    ( . PEERS/env.sh vllm+flashinfer; python3 benchmarks/peers/attention.py )
    python3 benchmarks/peers/attention.py --decode 1:65536,64:4096:16/8 --prefill '' --peers fa3,fi_dec_tc
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attention_cases import DECODE, DEV, PREFILL, Case, graph_of, parse, target

OURS = "dougong"
LIMIT = 0.02  # of an answer's relative error: bfloat16 gives 0.003
Run = Callable[[], Any]
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------ engines
# Each takes a Case, does what comes before the timed call, and gives the call, which writes case.out.


def dougong(case: Any) -> Run:
    from dougong_kernels.config import configs_for

    return case.make(configs_for(target(), case.shape.head_dim))[0]


def fa3(case: Any) -> Run:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    shape = case.shape
    schedule = get_scheduler_metadata(
        batch_size=case.rows, max_seqlen_q=case.q_len, max_seqlen_k=case.length, num_heads_q=shape.num_heads,
        num_heads_kv=shape.num_kv_heads, headdim=shape.head_dim, cache_seqlens=case.kv_len, qkv_dtype=case.q.dtype,
        cu_seqlens_q=case.cu, page_size=shape.block_size, causal=True,
    )  # fmt: skip
    return partial(
        flash_attn_varlen_func, case.q, case.k, case.v, max_seqlen_q=case.q_len, cu_seqlens_q=case.cu,
        max_seqlen_k=case.length, seqused_k=case.kv_len, softmax_scale=shape.scale, causal=True,
        block_table=case.table, out=case.out, scheduler_metadata=schedule, fa_version=3,
    )  # fmt: skip


@lru_cache(maxsize=1)
def workspace() -> torch.Tensor:
    """FlashInfer's room for partial results; runs follow each other, so that one serves all its kernels."""
    return torch.zeros(512 << 20, dtype=torch.uint8, device=DEV)


def pages(case: Any) -> list[torch.Tensor]:
    """The block table as FlashInfer takes it: where each row's blocks begin, the blocks, how full the last one is."""
    rows, blocks = case.table.shape
    begins = torch.arange(rows + 1, dtype=torch.int32, device=case.table.device) * blocks
    full = (case.length - 1) % case.shape.block_size + 1
    return [begins, case.table.reshape(-1), torch.full_like(case.kv_len, full)]


def flashinfer_decode(case: Any, tensor_cores: bool) -> Run:
    import flashinfer

    shape = case.shape
    engine = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", use_tensor_cores=tensor_cores)
    engine.plan(
        *pages(case), shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size,
        q_data_type=case.q.dtype, kv_data_type=case.kv.dtype, sm_scale=shape.scale,
    )  # fmt: skip
    return partial(engine.run, case.q, case.kv, out=case.out)


def flashinfer_prefill(case: Any, backend: str) -> Run:
    import flashinfer

    shape = case.shape
    engine = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend)
    engine.plan(
        case.cu, *pages(case), shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size, causal=True,
        q_data_type=case.q.dtype, kv_data_type=case.kv.dtype, sm_scale=shape.scale,
    )  # fmt: skip
    return partial(engine.run, case.q, case.kv, out=case.out)


PEERS: dict[str, Callable[[Any], Run]] = {
    "fa3": fa3,
    "fi_dec": partial(flashinfer_decode, tensor_cores=False),
    "fi_dec_tc": partial(flashinfer_decode, tensor_cores=True),
    "fi_fa2": partial(flashinfer_prefill, backend="fa2"),
    "fi_fa3": partial(flashinfer_prefill, backend="fa3"),
}
PACKAGES = {OURS: "dougong_kernels", "fa3": "vllm"}  # the others are of flashinfer


def engines_for(kind: str, peers: list[str]) -> dict[str, Callable[[Any], Run]]:
    """Ours and the peers that can do this kind."""
    return {OURS: dougong} | {p: PEERS[p] for p in peers if kind == "decode" or not p.startswith("fi_dec")}


def versions(engine: str) -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", PACKAGES.get(engine, "flashinfer")):
        version = getattr(sys.modules.get(package), "__version__", "")
        try:
            found[package] = str(version or importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


# ------------------------------------------------------------------------------------------------------- timing
class Clock:
    """All that needs the device: time of one run in us behind a flush of L2, the host's part of it, graphs."""

    def __init__(self, flush_mib: int) -> None:
        self.flush = torch.empty(flush_mib << 20, dtype=torch.int8, device=DEV)
        self.begin, self.end = torch.cuda.Event(True), torch.cuda.Event(True)
        self.sync = torch.cuda.synchronize
        self.flush_us = statistics.median([self.once(self.flush.zero_) for _ in range(9)][2:])

    def once(self, run: Run) -> float:
        self.flush.zero_()
        self.begin.record()
        run()
        self.end.record()
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end) * 1e3)

    def capture(self, run: Run) -> Run:
        stream = torch.cuda.current_stream()
        try:
            return graph_of(run)
        finally:
            torch.cuda.set_stream(stream)  # torch stays on the capture's stream where a capture fails

    def host(self, run: Run) -> float:
        """Median time of the host's part, the queue being empty as before a timed run."""
        times = []
        for _ in range(10):
            self.sync()
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e6)
        self.sync()
        return statistics.median(times)


def told(error: Exception) -> str:
    """A line; the traceback goes to stderr. A failed capture's own error says only that something before it failed."""
    traceback.print_exception(error)
    texts = [f"{type(e).__name__}: {e}" for e in (error, error.__context__) if e is not None]
    return " ".join(" after ".join(text[:250] for text in texts).split())


def take_turns(
    lanes: dict[Hashable, Run], once: Callable[[Run], float], rounds: int, runs: int
) -> tuple[dict[Hashable, list[float]], dict[Hashable, str]]:
    """The times of each lane, and why a lane was given up. Another lane begins in each round.

    The first round and each turn's first run do not count: the clock comes up, and the caches hold another's code.
    """
    times: dict[Hashable, list[float]] = {lane: [] for lane in lanes}
    lost: dict[Hashable, str] = {}
    order = list(lanes)
    for number in range(rounds + 1):
        at = number % max(len(order), 1)
        for lane in order[at:] + order[:at]:
            if lane in lost:
                continue
            try:
                found = [once(lanes[lane]) for _ in range(runs + 1)]
            except Exception as error:
                lost[lane] = told(error)
                continue
            if number:
                times[lane] += found[1:]
    return times, lost


def answer(case: Any, run: Run, clock: Any) -> float:
    """Relative error; raises where it is not that of bfloat16."""
    case.out.fill_(float("nan"))
    run()
    clock.sync()
    error = float(case.error())
    if not error < LIMIT:  # a NaN is not
        raise ArithmeticError(f"wrong answer, relative error {error:.3g}")
    return error


def blank(engine: str, error: str | None = None) -> Row:
    return dict(
        engine=engine, us_p50=None, graph_us=None, host_us=None, host_bound=None, rate=None, graph_rate=None,
        relative_error=None, error=error, graph_error=None,
    )  # fmt: skip


def measure(case: Any, engines: dict[str, Callable[[Any], Run]], clock: Any, rounds: int, runs: int) -> list[Row]:
    """A row for each engine, whatever happens to it."""
    rows: dict[str, Row] = {}
    lanes: dict[Hashable, Run] = {}
    for name, make in engines.items():
        row = rows[name] = blank(name)
        try:
            run = make(case)
            row["relative_error"] = round(answer(case, run, clock), 6)
            row["host_us"] = round(clock.host(run), 1)
            row["host_bound"] = bool(row["host_us"] > 0.9 * clock.flush_us)
        except Exception as error:
            row["error"] = told(error)
            continue
        lanes[name, ""] = run
        try:
            replay = clock.capture(run)
            answer(case, replay, clock)
        except Exception as error:
            row["graph_error"] = told(error)
            continue
        lanes[name, "graph_"] = replay
    times, lost = take_turns(lanes, clock.once, rounds, runs)
    for lane in lanes:
        name, mode = lane  # type: ignore[misc]
        if lane in lost:
            rows[name][f"{mode}error"] = lost[lane]
            continue
        us = statistics.median(times[lane])
        low, *_, high = statistics.quantiles(times[lane], n=10)
        rows[name]["graph_us" if mode else "us_p50"] = round(us, 2)
        rows[name][f"{mode}rate"] = round(case.rate(us), 1)
        rows[name][f"{mode}p10_p90"] = [round(low, 2), round(high, 2)]
    return list(rows.values())


# -------------------------------------------------------------------------------------------------------- table
def compare(rows: list[Row], mode: str) -> Row:
    """Ours, the best peer and the ratio (each may be None) in one case, and which of the two the host bounds.

    mode: us_p50 (called directly) or graph_us
    """
    times = {row["engine"]: row[mode] for row in rows if row[mode] is not None}
    ours = times.pop(OURS, None)
    peer = min(times, key=lambda name: times[name], default=None)
    ratio = times[peer] / ours if peer is not None and ours else None
    bound = {row["engine"] for row in rows if mode == "us_p50" and row["host_bound"]} & {OURS, peer}
    return dict(ours=ours, peer=peer, us=times.get(peer), ratio=ratio, bound=bound)


def title(row: Row) -> str:
    return f"{row['kind']:7s} {row['batch']:4d} x {row['ctx']:6,d} {row['hq']:3d}/{row['hkv']}"


def columns(found: Row) -> str:
    ours, peer = (
        "-" if us is None else f"{us:,.1f}{'*' if engine in found['bound'] else ''}"
        for us, engine in ((found["ours"], OURS), (found["us"], found["peer"]))
    )
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f}"
    return f"{ours:>10s} {peer:>10s} {found['peer'] or '-':9s} {ratio:>5s}"


def table(cases: list[list[Row]]) -> list[str]:
    """The worst first: cases without a ratio, then by the lower of both ratios."""
    found = [(title(rows[0]), compare(rows, "graph_us"), compare(rows, "us_p50")) for rows in cases]
    found.sort(key=lambda line: min(-1.0 if f["ratio"] is None else f["ratio"] for f in line[1:]))
    head = f"{'ours us':>10s} {'peer us':>10s} {'the best':9s} ratio"
    lines = [
        f"{'':27s} | {'replayed from a graph':^37s} | {'called directly':^37s}",
        f"{'peer / ours, worst first':27s} | {head} | {head}",
    ]
    lines += [f"{name:27s} | {columns(graph)} | {columns(direct)}" for name, graph, direct in found]
    if any(direct["bound"] for _, _, direct in found):
        lines.append("* the host's call takes longer than the flush, so that this is the host's time: see --flush-mib")
    for row in (row for rows in cases for row in rows):
        for key, what in (("error", "was not measured"), ("graph_error", "was not replayed")):
            if row[key]:
                lines.append(f"{title(row)}: {row['engine']} {what}: {row[key]}")
    return lines


# --------------------------------------------------------------------------------------------------------- main
def run_case(spec: tuple[str, int, int, int, int], a: argparse.Namespace, clock: Any) -> list[Row]:
    kind, batch, length, heads, kv_heads = spec
    engines = engines_for(kind, a.peers)
    try:
        # A generator of its own: torch's is of no use any more where a capture has failed.
        generator = torch.Generator(DEV).manual_seed(0)
        rows = measure(Case(*spec, 128, a.page, generator), engines, clock, a.rounds, a.runs)
    except Exception as error:  # the case itself: no memory
        why = told(error)
        rows = [blank(name, why) for name in engines]
    unit = "GB/s" if kind == "decode" else "TFLOP/s"
    facts = dict(
        bench="attention beside peers", device=torch.cuda.get_device_name(), kind=kind, batch=batch, ctx=length,
        hq=heads, hkv=kv_heads, page=a.page, unit=unit,
    )  # fmt: skip
    rows = [facts | row | dict(versions=versions(row["engine"])) for row in rows]
    for row in rows:
        print(json.dumps(row), flush=True)
    gc.collect()  # closures hold the cache; the next case needs the memory
    torch.cuda.empty_cache()
    return rows


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = "ROWS:LENGTH[:HEADS/KV_HEADS],...; 32/8 heads where none are given; '' for none"
    parser.add_argument("--decode", default=f"{DECODE},64:4096:16/8", help=f"{shape} (%(default)s)")
    parser.add_argument("--prefill", default=PREFILL, help="the same (%(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s")
    parser.add_argument("--page", type=int, default=16, help="tokens in a block (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each engine has in a case (%(default)s)")
    parser.add_argument("--runs", type=int, default=10, help="timed runs in a turn (%(default)s)")
    parser.add_argument("--flush-mib", type=int, default=512, help="memory written before each run (%(default)s)")
    a = parser.parse_args(given)
    a.peers = [peer for peer in a.peers.split(",") if peer]
    if unknown := [peer for peer in a.peers if peer not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)} unknown; known: {', '.join(PEERS)}")
    if not a.peers:
        parser.error(f"--peers: none given; known: {', '.join(PEERS)}")
    if a.rounds * a.runs < 2 or a.rounds < 1 or a.flush_mib < 1:
        parser.error("at least two timed runs and a flush of 1 MiB are needed")
    try:
        a.cases = parse(a.decode, "decode", "32/8") + parse(a.prefill, "prefill", "32/8")
    except ValueError as error:
        parser.error(f"--decode and --prefill take {shape}: {error}")
    if not a.cases:
        parser.error("no case: --decode and --prefill are both empty")
    return a


def main(given: list[str] | None = None) -> int:
    a = arguments(given)
    if not torch.cuda.is_available() or torch.version.hip:
        found = "an AMD GPU" if torch.version.hip else "no CUDA device"
        print(
            f"asked: {len(a.cases)} cases of {OURS} beside {', '.join(a.peers)} on one NVIDIA GPU; "
            f"found: {found} (torch {torch.__version__}, CUDA {torch.version.cuda})",
            file=sys.stderr,
        )
        return 2
    clock = Clock(a.flush_mib)
    head = dict(device=torch.cuda.get_device_name(), flush_mib=a.flush_mib, flush_us=round(clock.flush_us, 1))
    print(json.dumps(head | dict(rounds=a.rounds, runs=a.runs)), flush=True)
    cases = [run_case(spec, a, clock) for spec in a.cases]
    print("\n".join(table(cases)))
    return int(any(compare(rows, mode)["ratio"] is None for rows in cases for mode in ("us_p50", "graph_us")))


if __name__ == "__main__":
    sys.exit(main())
