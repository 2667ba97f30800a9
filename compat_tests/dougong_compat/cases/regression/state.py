"""G to J. State that outlives a call, concurrency, the block manager, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import Entry

__all__ = ["collect"]

_SMALL: dict[str, Any] = {"H": 4, "K": 1}
_ROWS: list[list[int]] = [[1, 9], [1, 40]]


def collect() -> Iterator[Case]:
    yield from _graphs()
    yield from _concurrency()
    yield from _manager()
    yield from _determinism()


def _graphs() -> Iterator[Case]:
    a = Entry(58, "vllm-ascend-10895-stale-length-in-replay", "vllm-project/vllm-ascend", 10895)
    for name, replays in {
        "longer": [{"rows": [[1, 10], [1, 41]]}, {"rows": [[1, 30], [1, 90]]}],
        "shorter": [{"rows": [[1, 2], [1, 3]]}],
        "same": [{}, {}],
        "swapped": [{"rows": [[1, 40], [1, 9]]}],
    }.items():
        yield a.call(name, "graph", "L4", rows=_ROWS, replays=replays, needs=("graphs",), **_SMALL)
    a = Entry(59, "fa-1a58058a-semaphore-not-reset", "Dao-AILab/flash-attention", "1a58058a")
    for name, replays in {
        "big-then-small": [{"rows": [[1, 3], [1, 900]]}, {"rows": [[1, 900], [1, 3]]}, {"rows": [[1, 1], [1, 1]]}],
        "same-again": [{}, {}, {}],
    }.items():
        yield a.call(name, "graph", "L2", rows=[[1, 700], [1, 20]], replays=replays, eager=True, **_SMALL)
    a = Entry(60, "vllm-ascend-8508-window-and-new-table", "vllm-project/vllm-ascend", 8508)
    yield a.call(
        "tables", "graph", "L4", rows=_ROWS, replays=[{"page_seed": 1}, {"page_seed": 2, "rows": [[1, 12], [1, 50]]}],
        window=16, needs=("graphs",), **_SMALL,
    )  # fmt: skip
    yield a.call(
        "eager", "graph", "L2", rows=_ROWS, replays=[{"page_seed": 1}, {"page_seed": 2, "rows": [[1, 12], [1, 50]]}],
        window=16, eager=True, **_SMALL,
    )  # fmt: skip


def _concurrency() -> Iterator[Case]:
    a = Entry(61, "vllm-45704-copy-before-compute", "vllm-project/vllm", 45704)
    yield a.case("copy-out", "L0", "device", check="copy_after_compute")
    yield a.case("copy-in", "L0", "device", check="compute_after_copy")
    a = Entry(62, "tensorrt-llm-15546-pinned-buffer-reused", "NVIDIA/TensorRT-LLM", 15546)
    yield a.case("event", "L0", "device", check="pinned_lifetime")
    a = Entry(63, "llama-cpp-17887-shared-memory-race", "ggml-org/llama.cpp", 17887)
    for batch, rows in (
        ("split", [[1, 3000]]),
        ("many", [[1, 37 * i + 1] for i in range(12)]),
        ("extend", [[33, 500]]),
    ):
        for dtype in ("own", "float32"):
            yield a.call(
                f"{batch}-{dtype}", "stress", "L4", rows=rows, check="rerun", times=5, profile="full", dtype=dtype,
                needs=("deterministic",), **_SMALL,
            )  # fmt: skip
    yield a.variants(
        "twice",
        {"rows": [[1, 1500], [1, 7]], **_SMALL},
        [{"mode": "oracle", "name": "again"}, {"mode": "oracle", "name": "and again"}],
    )
    for entry, name, repository, thread, check in (
        (64, "vllm-45357-freed-in-flight", "vllm-project/vllm", 45357, "held_until_released"),
        (65, "sglang-38319-insert-against-retract", "sgl-project/sglang", 38319, "insert_then_preempt"),
    ):
        yield Entry(entry, name, repository, thread).case(check, "L2", "manager", ("kv_manager",), check=check)


def _manager() -> Iterator[Case]:
    a = Entry(66, "vllm-17362-copy-blocks-layout", "vllm-project/vllm", 17362)
    for layout in ("nhd", "hnd"):
        params = {
            "rows": [[1, 70]],
            "layout": layout,
            "block": 16,
            "source": [1, 2],
            "target": [3, 4],
            "num_layers": 2,
            "spare": 4,
        }
        yield a.case(f"copy-{layout}", "L2", "copy", (f"layout:{layout}", "block:16"), lse=False, **params)
        yield a.case(
            f"swap-{layout}", "L2", "convert", (f"layout:{layout}", "block:16"), lse=False, through="hnd",
            through_block=16, **params,
        )  # fmt: skip
    yield a.case("cow", "L2", "manager", ("kv_manager",), check="copy_on_write")
    a = Entry(67, "vllm-30931-prefix-key-collisions", "vllm-project/vllm", 30931)
    for what in ("adapter", "salt", "image", "position", "parent"):
        yield a.case(what, "L2", "manager", ("kv_manager",), check="prefix_key", what=what)
    a = Entry(68, "lmcache-2206-partial-chunk", "LMCache/LMCache", 2206)
    for total in (31, 32, 33):
        yield a.case(f"{total}", "L2", "manager", ("kv_manager",), check="partial_prefix", total=total)
    yield a.case("hybrid", "L2", "manager", ("kv_manager",), check="hybrid_prefix")
    a = Entry(69, "vllm-ascend-11334-resumed-is-not-a-prompt", "vllm-project/vllm-ascend", 11334)
    yield a.case("preempted", "L3", "engine", ("engine",), check="preempt", blocks=14)
    yield a.case("release-and-begin", "L2", "manager", ("kv_manager",), check="resume")


def _determinism() -> Iterator[Case]:
    a = Entry(70, "vllm-53257-not-batch-invariant", "vllm-project/vllm", 53257)
    for name, rows in {
        "decode": [[1, 40], [1, 300], [1, 7], [1, 900]],
        "extend": [[1, 40], [5, 70], [17, 33]],
    }.items():
        keeps: list[dict[str, Any]] = [{"keep": [row], "name": f"row {row} alone"} for row in range(len(rows))]
        keeps.append({"keep": [0, len(rows) - 1], "name": "first and last row"})
        for dtype in ("own", "float32"):  # rounding to 16 bits hides most of it
            base = {"rows": rows, "batch_invariant": True, "dtype": dtype, **_SMALL}
            yield a.variants(f"{name}-{dtype}", base, keeps, level="L4", needs=("batch_invariant",))
