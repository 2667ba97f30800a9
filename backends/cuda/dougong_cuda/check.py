"""``python -m dougong_cuda.check``: on a machine with a GPU, every provider against the core's reference, and how fast.

Prints a JSON line per check and a summary; exit status 1 if anything was wrong. About a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from dougong.errors import DougongError, KernelSelectionError
from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionQuery,
    AttentionSpec,
    Backend,
    BatchView,
    KVGroup,
    LayerArgs,
    LayerCache,
    Limits,
    LinearKernel,
    LinearQuery,
    RaggedKV,
    allocate_cache,
    open_backend,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong_cuda.quantize import quantize_rows

__all__ = ["main"]

PROVIDERS = ("triton", "triton + flash-attention", "flash-attention", "flashinfer", "torch varlen")
BATCHES = {
    "decode": ([1, 1, 1, 1], [333, 1, 16, 129]),
    "prefill": ([200, 3, 65], [200, 3, 65]),
    "mixed": ([1, 1, 70, 0, 5], [900, 5, 400, 12, 5]),
    "blind": ([1, 5, 2], [0, 3, 0]),
    "long": ([1, 4100], [333, 4100]),
}
#: A library builds a kernel of its own for some of these, which takes a compiler and a minute: only with --all.
FEATURES: dict[str, dict[str, Any]] = {"plain": {}, "lse": {"lse": True}}
MORE: dict[str, dict[str, Any]] = {"softcap": {"softcap": 20.0}, "noncausal": {"causal": False}}
BLOCK = 16
#: (rows, queries of each, keys of each).
SPEEDS = ((1, 1, 4096), (64, 1, 2048), (8, 1024, 1024), (4, 2048, 2048), (1, 2048, 16384), (1, 4096, 4096),
          (2, 4096, 4096), (1, 8192, 8192))  # fmt: skip
#: Llama-3.1-8B's matrices: (inputs, outputs).
LINEARS = {"qkv": (4096, 6144), "out": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
ROWS = (1, 16, 256, 8192)


def problem(
    spec: AttentionSpec, q_lens: list[int], kv_lens: list[int], device: torch.device
) -> tuple[BatchView, torch.Tensor, LayerCache]:
    """A batch over a cache in random blocks, NaN in every slot that nobody wrote; q a slice of a packed tensor."""
    counts = [-(-length // BLOCK) for length in kv_lens]
    blocks = sum(counts) + 2
    cache = allocate_cache(spec, NHD, blocks, BLOCK, device)
    for plane in cache.planes.values():
        plane.fill_(torch.nan)
    table = torch.full((len(kv_lens), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    free = (torch.randperm(blocks - 1) + 1).int()
    at = 0
    for row, count in enumerate(counts):
        table[row, :count] = free[at : at + count]
        place = torch.arange(kv_lens[row])
        slots = (table[row].long()[place // BLOCK] * BLOCK + place % BLOCK).to(device)
        shape = kv_lens[row], spec.num_kv_heads, spec.head_dim
        cache.write(slots, *(torch.randn(shape, device=device).to(spec.dtype) for _ in range(2)))
        at += count
    batch = BatchView.build(q_lens, kv_lens, table, BLOCK, device, slots=torch.arange(sum(q_lens), device=device))
    q = torch.randn(batch.num_tokens, 2 * spec.num_heads, spec.head_dim, device=device).to(spec.dtype)
    return batch, q[:, : spec.num_heads], cache


def make(
    backend: Backend, spec: AttentionSpec, batch: BatchView, provider: str, ragged: bool = False
) -> AttentionKernel:
    """The provider's kernel for such batches.

    Raises:
        KernelSelectionError: it refuses.
    """
    query = AttentionQuery(spec=spec, layout=NHD, block_size=BLOCK, ragged=ragged)
    target = ReferenceAttention if provider == "reference" else backend.choose_attention(query, provider).target
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=NHD, manager_block=BLOCK, kernel_block=BLOCK)
    longest = max(16, batch.groups[0].max_kv_len)
    limits = Limits(
        max_rows=batch.num_rows + 1, max_tokens=max(16, batch.num_tokens), max_kv_len=longest,
        max_blocks=batch.groups[0].block_table.shape[1],
    )  # fmt: skip
    kernel: AttentionKernel = target(spec, group, limits, backend.device)
    return kernel


def attend(
    kernel: AttentionKernel, batch: BatchView, q: torch.Tensor, kv: LayerCache | RaggedKV
) -> tuple[torch.Tensor, torch.Tensor | None]:
    spec, plan = kernel.spec, kernel.new_plan()
    out = torch.full((batch.num_tokens, spec.num_heads, spec.head_dim_v), torch.nan, dtype=spec.dtype, device=q.device)
    lse = torch.full((batch.num_tokens, spec.num_heads), torch.nan, device=q.device) if spec.lse else None
    kernel.plan(batch, plan)
    kernel.run(plan, LayerArgs(), q, kv, out=out, lse=lse)
    return out, lse


def differs(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a query and head; beyond 1e30 where one is not a number, or 0 and the other not."""
    got, want = got.float(), want.float()
    error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    bad = torch.where(size == 0, torch.where(error == 0, 0.0, torch.inf), error / size)
    return float(bad.nan_to_num(nan=torch.inf).max())


def lse_differs(got: torch.Tensor, want: torch.Tensor) -> float:
    same = torch.isneginf(got) == torch.isneginf(want)
    gap = torch.where(torch.isneginf(want), 0.0, (got - want).abs())
    return float(torch.where(same, gap, torch.inf).nan_to_num(nan=torch.inf).max())


def answers(backend: Backend, features: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each provider, feature, width and batch against the reference."""
    device = backend.device.torch_device
    for dim in (128, 64):
        for name, more in features.items():
            if dim == 64 and name == "plain":  # each is a kernel to compile; what lse does, plain does
                continue
            spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=dim, dtype=torch.bfloat16, **more)
            for kind, (q_lens, kv_lens) in BATCHES.items():
                batch, q, cache = problem(spec, q_lens, kv_lens, device)
                want, want_lse = attend(make(backend, spec, batch, "reference"), batch, q, cache)
                for provider in PROVIDERS:
                    row = {"check": "attention", "provider": provider, "dim": dim, "feature": name, "batch": kind}
                    yield row | one(compare, backend, spec, batch, q, cache, provider, want, want_lse)
            lens = [200, 3, 65]
            batch = BatchView.build(lens, lens, torch.zeros(3, 14, dtype=torch.int32), BLOCK, device)
            keys = torch.randn(2, sum(lens), 2, dim, device=device).to(spec.dtype)
            ragged = RaggedKV(keys[0], keys[1], batch.cu_q, batch.host_cu_q)
            q = torch.randn(sum(lens), 8, dim, device=device).to(spec.dtype)
            want, want_lse = attend(make(backend, spec, batch, "reference"), batch, q, ragged)
            for provider in PROVIDERS:
                row = {"check": "attention", "provider": provider, "dim": dim, "feature": name, "batch": "ragged"}
                yield row | one(compare, backend, spec, batch, q, ragged, provider, want, want_lse)


def compare(
    backend: Backend, spec: AttentionSpec, batch: BatchView, q: torch.Tensor, kv: LayerCache | RaggedKV, provider: str,
    want: torch.Tensor, want_lse: torch.Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    kernel = make(backend, spec, batch, provider, isinstance(kv, RaggedKV))
    got, got_lse = attend(kernel, batch, q, kv)
    row: dict[str, Any] = {"error": differs(got, want)}
    ok = row["error"] < 0.02
    if want_lse is not None and got_lse is not None:
        row["lse_error"] = lse_differs(got_lse, want_lse)
        ok = ok and row["lse_error"] < 2e-3
    return row | {"ok": ok}


def one(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A check's row: a refusal is no fault, an exception is."""
    try:
        return work(*arguments)
    except KernelSelectionError as error:
        reasons = str(error).splitlines()[1:]
        return {"ok": True, "refused": [reason for reason in reasons if "was asked for" not in reason]}
    except Exception as error:
        return {"ok": False, "raised": f"{type(error).__name__}: {error}"[:500]}


def replays(backend: Backend) -> Iterator[dict[str, Any]]:
    """Decodes captured at some lengths and replayed at others, where a provider says that graphs may hold them."""
    device, graphs = backend.device.torch_device, backend.device.graphs
    assert graphs is not None
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    batch, q, cache = problem(spec, [1] * 4, [40, 333, 129, 16], device)
    batch.groups[0].max_kv_len = 512
    shorter = torch.tensor([17, 0, 128, 3], dtype=torch.int32)
    later = replace(
        batch, groups=(replace(batch.groups[0], kv_len=batch.groups[0].kv_len.clone(), host_kv_len=shorter),)
    )
    later.groups[0].kv_len.copy_(shorter)
    want, _ = attend(make(backend, spec, batch, "reference"), later, q, cache)

    def replay(provider: str) -> dict[str, Any]:
        kernel, out = make(backend, spec, batch, provider), torch.full_like(want, torch.nan)
        kernel_spec = next(c.spec for c in backend.candidates["attention"] if c.spec.provider == provider)
        if kernel_spec.graph == "none":
            return {"ok": True, "refused": ["runs outside graphs"]}
        plan, fixed = kernel.new_plan(), batch.groups[0].kv_len.clone()
        view = replace(batch.groups[0], kv_len=fixed)
        kernel.plan(replace(batch, groups=(view,)), plan)
        kernel.run(plan, LayerArgs(), q, cache, out=out)
        graph = graphs.new(graphs.new_pool())
        with graph.capture():
            kernel.run(plan, LayerArgs(), q, cache, out=out)
        fixed.copy_(shorter)
        kernel.plan(replace(batch, groups=(replace(view, host_kv_len=shorter),)), plan)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        error = differs(out, want)
        return {"error": error, "ok": error < 0.02}

    for provider in PROVIDERS:
        yield {"check": "graph", "provider": provider} | one(replay, provider)


def microseconds(work: Callable[[], Any], flush: torch.Tensor, times: int = 12) -> float:
    """Median device time; what fits in the cache is pushed out of it in between."""
    for _ in range(2):
        work()
    found = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) * 1e3)
    return sorted(found)[len(found) // 2]


def graphed(work: Callable[[], Any]) -> Callable[[], Any]:
    """``work`` as a graph's replay, so that the host's share is not timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def attention_speed(backend: Backend) -> Iterator[dict[str, Any]]:
    """Where each provider is fast: decodes in GB/s of keys and values, prompts in TFLOP/s."""
    device = backend.device.torch_device
    flush = torch.empty(128 << 20, dtype=torch.int8, device=device)
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    for rows, queries, keys in SPEEDS:
        batch, q, cache = problem(spec, [queries] * rows, [keys] * rows, device)
        for provider in PROVIDERS:
            row = {"check": "attention speed", "provider": provider, "rows": rows, "queries": queries, "keys": keys}
            yield row | one(speed, backend, spec, batch, q, cache, provider, flush)


def speed(
    backend: Backend, spec: AttentionSpec, batch: BatchView, q: torch.Tensor, cache: LayerCache, provider: str,
    flush: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    kernel = make(backend, spec, batch, provider)
    plan, out = kernel.new_plan(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernel.plan(batch, plan)
    us = microseconds(lambda: kernel.run(plan, LayerArgs(), q, cache, out=out), flush)
    rows, queries, keys = batch.num_rows, batch.max_q_len, batch.groups[0].max_kv_len
    if queries == 1:
        moved = rows * keys * 2 * spec.num_kv_heads * spec.head_dim * 2
        return {"us": round(us, 1), "GB/s": round(moved / us / 1e3), "ok": True}
    pairs = queries * keys - queries * (queries - 1) // 2
    work = 4 * rows * pairs * spec.num_heads * spec.head_dim
    return {"us": round(us, 1), "TFLOP/s": round(work / us / 1e6), "ok": True}


def linears(backend: Backend) -> Iterator[dict[str, Any]]:
    """Products in 8-bit floats: against those of the rounded operands, and their time beside bfloat16."""
    device = backend.device.torch_device
    flush = torch.empty(128 << 20, dtype=torch.int8, device=device)
    for name, (inputs, outputs) in LINEARS.items():
        query = LinearQuery(in_features=inputs, out_features=outputs, dtype=torch.bfloat16, format="fp8")
        try:
            kernel = backend.choose_linear(query).target(query, backend.device)
        except KernelSelectionError as error:
            yield {"check": "fp8 linear", "ok": True, "refused": str(error).splitlines()[1:]}
            return
        weight = torch.randn(outputs, inputs, device=device).to(torch.bfloat16) * inputs**-0.5
        packed = kernel.prepare(weight)
        for rows in ROWS:
            x = torch.randn(rows, inputs, device=device).to(torch.bfloat16)
            yield {"check": "fp8 linear", "matrix": name, "rows": rows} | one(product, kernel, x, weight, packed, flush)


def product(
    kernel: LinearKernel, x: torch.Tensor, weight: torch.Tensor, packed: Any, flush: torch.Tensor
) -> dict[str, Any]:
    few = x[:256]
    q, scale = quantize_rows(few)
    rounded = (q.float() * scale) @ (packed.q.float() * packed.scale).T
    got, dense = kernel.apply(x, packed)[:256].float(), F.linear(few, weight).float()
    exact = float((got - rounded).norm() / rounded.norm())
    error = float((got - dense).norm() / dense.norm())
    bf16 = microseconds(graphed(lambda: F.linear(x, weight)), flush)
    fp8 = microseconds(graphed(lambda: kernel.apply(x, packed)), flush)
    rounding = microseconds(graphed(lambda: quantize_rows(x)), flush)
    return {
        "error against rounded": round(exact, 5), "error against bf16": round(error, 4), "bf16 us": round(bf16, 1),
        "fp8 us": round(fp8, 1), "of it rounding us": round(rounding, 1), "speed-up": round(bf16 / fp8, 2),
        "ok": exact < 0.01 and error < 0.06,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dougong_cuda.check", description=__doc__)
    parser.add_argument("--device-index", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="more features, some of which a library compiles first")
    parser.add_argument("--no-speed", action="store_true", help="whether it is right, not how fast")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        backend = open_backend("cuda", index=options.device_index)
    except DougongError as error:
        print(error, file=sys.stderr)
        return 2
    started, counts = time.perf_counter(), Counter[tuple[str, str]]()
    parts = [answers(backend, FEATURES | MORE if options.all else FEATURES), replays(backend)]
    if not options.no_speed:
        parts += [attention_speed(backend), linears(backend)]
    with torch.inference_mode():
        for part in parts:
            for row in part:
                print(json.dumps(row), flush=True)
                counts[row.get("provider", row["check"]), outcome(row)] += 1
    print(f"{summary(counts)}; {time.perf_counter() - started:.0f} s on {backend.device.name}")
    return 1 if any(what == "wrong" for _, what in counts) else 0


def outcome(row: dict[str, Any]) -> str:
    """A refusal is no fault, and no agreement either."""
    return "wrong" if not row["ok"] else "refused" if "refused" in row else "right"


def summary(counts: Counter[tuple[str, str]]) -> str:
    """How many checks came out how, in all and for each provider."""

    def of(some: dict[str, int]) -> str:
        return ", ".join(f"{some[what]} {what}" for what in ("right", "wrong", "refused") if some.get(what))

    whole, each = Counter[str](), dict[str, Counter[str]]()
    for (provider, what), count in counts.items():
        whole[what] += count
        each.setdefault(provider, Counter())[what] += count
    parts = "; ".join(f"{provider}: {of(some)}" for provider, some in each.items())
    return f"{whole.total()} checks: {of(whole)} ({parts})"


if __name__ == "__main__":
    sys.exit(main())
