"""``dougong bench kv``: what the scheduler and the KV manager cost.

Pure Python, one thread. Each figure is the best of several repeats, because other load on the machine can only add to
it. ``loop_ns`` is what one turn of an empty loop took in the same run: about 28 on the reference machine when it is
quiet, so that figures from a busy one can be told.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.bench.report import check_plot, emit, plot_bars
from dougong.kv import BlockHasher, BlockPool, GroupSpec, KVCacheManager, KVSequence
from dougong.scheduling import Request, Scheduler, SchedulerConfig
from dougong.types import SamplingParams

__all__ = ["block_hash", "kv", "empty_loop", "pool_operations", "prefix_lookups", "run", "steady_decode"]

BLOCK = 16


def _best(work: Callable[[], int], repeats: int) -> float:
    """Least microseconds per unit; ``work`` returns how many units it did."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter_ns()
        units = work()
        best = min(best, (time.perf_counter_ns() - start) / 1e3 / units)
    return best


def empty_loop(repeats: int = 100) -> float:
    """Microseconds per turn of an empty loop: how fast the machine is just now."""

    def work() -> int:
        for _ in range(4096):
            pass
        return 4096

    return _best(work, repeats)


def steady_decode(running: int = 256, overlap: bool = False, repeats: int = 80) -> float:
    """Microseconds of schedule + commit per running request per step, all of them decoding.

    The prompts' lengths differ, so that the same share of requests fills a block in every step.
    """
    total = 64 + BLOCK + (repeats + 3) * BLOCK
    blocks = running * (total // BLOCK + 2) + 1
    kv = KVCacheManager([GroupSpec(block_size=BLOCK, num_blocks=blocks)])
    config = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=running * 128, max_model_len=total + BLOCK)
    scheduler = Scheduler(config, kv)
    for i in range(running):
        prompt = [(i * 7919 + j) % 32000 for j in range(64 + i % BLOCK)]
        sampling = SamplingParams(max_tokens=None, ignore_eos=True)
        scheduler.add(Request(f"r{i}", prompt, sampling, eos_token_ids=[2]))
    sampled: list[int | None] = [17] * running
    plan = scheduler.schedule()
    assert plan is not None

    best = [float("inf")] * BLOCK
    for _ in range(repeats):
        for phase in range(BLOCK):
            # Every BLOCK steps the same work comes again, so the best of each phase is kept: windows of one step are
            # short enough to fall between other load.
            assert plan is not None
            start = time.perf_counter_ns()
            if overlap:
                ahead = scheduler.schedule()
                scheduler.commit(plan, sampled)
                plan = ahead
            else:
                scheduler.commit(plan, sampled)
                plan = scheduler.schedule()
            best[phase] = min(best[phase], (time.perf_counter_ns() - start) / 1e3)
    return sum(best) / BLOCK / running


def block_hash(repeats: int = 400) -> float:
    """Microseconds per block of 16 tokens, hashing a prompt of 1024 tokens."""
    hasher = BlockHasher(BLOCK, b"key" * 8, "model")
    sequence = KVSequence([i * 7919 % 32000 for i in range(1024)])

    def work() -> int:
        chain = [hasher.root()]
        hasher.extend(chain, sequence, 1024 // BLOCK)
        return len(chain) - 1

    return _best(work, repeats)


def pool_operations(repeats: int = 400) -> float:
    """Microseconds to allocate, tag, release and revive one block, in requests of 64 blocks."""
    pool = BlockPool(65536)
    tags = [i.to_bytes(16, "little") for i in range(512)]

    def work() -> int:
        pool.clear_tags()
        for at in range(0, len(tags), 64):
            ids = pool.allocate(64)
            assert ids is not None
            for block, tag in zip(ids, tags[at : at + 64]):
                pool.tag(block, tag)
            pool.release(reversed(ids))
            for block in ids:
                pool.hold(block)
            pool.release(reversed(ids))
        return len(tags)

    return _best(work, repeats)


def prefix_lookups(repeats: int = 400) -> float:
    """Microseconds per block to find a cached prefix of 4096 tokens whose hashes are known."""
    kv = KVCacheManager([GroupSpec(block_size=BLOCK, num_blocks=1024)])
    sequence = KVSequence(range(4097))
    kv.begin(sequence, kv.match(sequence), 4097)
    kv.confirm(sequence, 4097)

    def work() -> int:
        return kv.match(sequence).num_tokens // BLOCK

    return _best(work, repeats)


def run() -> dict[str, float]:
    """All figures, in microseconds unless the name says otherwise."""
    pool, lookup = pool_operations(), prefix_lookups()
    return {
        "loop_ns": round(1e3 * empty_loop(), 1),
        "schedule_commit_us_per_request": round(steady_decode(), 3),
        "schedule_commit_us_per_request_overlap": round(steady_decode(overlap=True), 3),
        "block_hash_us": round(block_hash(), 3),
        "pool_cycle_us_per_block": round(pool, 3),
        "pool_block_cycles_per_s": round(1e6 / pool),
        "prefix_lookup_us_per_block": round(lookup, 3),
        "prefix_block_lookups_per_s": round(1e6 / lookup),
    }


def kv(plot: Annotated[Path | None, typer.Option(help="Draw the times to this PNG.")] = None) -> None:
    """Microseconds of schedule and commit per running request, of a block hash, and of pool and prefix index."""
    check_plot(plot)
    result = run()
    workload = {"running": 256, "block_size": BLOCK}
    emit("kv", workload, result, device={"backend": "none", "name": platform.processor() or platform.machine()})
    if plot is not None:
        plot_bars(plot, "scheduler and KV manager", "µs", {k: v for k, v in result.items() if "_us" in k})
