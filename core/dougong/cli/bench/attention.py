"""``dougong bench attention``: paged attention through the vendor contract, as a share of the device's own ceilings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dougong.cli import options
from dougong.cli.bench.report import check_plot, emit, plot_bars

if TYPE_CHECKING:
    import torch

    from dougong.hal import Backend

__all__ = ["attention"]


@dataclass(frozen=True)
class Shape:
    """Heads, dimension and block size of one run."""

    heads: int
    kv_heads: int
    dim: int
    block: int


def attention(
    decode: Annotated[str, typer.Option(help="ROWS:CONTEXT[,…] of one query each.")] = "1:512,8:512",
    prefill: Annotated[str, typer.Option(help="ROWS:LENGTH[,…] of whole prompts.")] = "1:512",
    heads: Annotated[str, typer.Option(help="Query and kv heads, as H/K.")] = "9/3",
    head_dim: Annotated[int, typer.Option(help="Head dimension.", min=1)] = 64,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    backend: options.Backend = None,
    provider: Annotated[str | None, typer.Option(help="Take only this provider's kernel.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each shape; the median counts.", min=1)] = 20,
    plot: Annotated[Path | None, typer.Option(help="Draw the shares to this PNG.")] = None,
) -> None:
    """Time decode and prefill; bytes/s beside a measured copy, FLOP/s beside a measured product.

    Inputs are fresh random data, the cache is walked in random block order, and each shape's output is compared with
    the torch reference. A time is what a caller waits for one call: launch and end included, the data as warm as the
    call before left it. Of a device's short kernels that is mostly the launch.
    """
    import torch

    from dougong.hal import open_backend

    check_plot(plot)
    shape = Shape(*options.query_and_kv_heads(heads), head_dim, block_size)
    kind = options.model_dtype(dtype)
    loads = {
        "decode": options.numbers("--decode", "ROWS:CONTEXT", decode, "8:512"),
        "prefill": options.numbers("--prefill", "ROWS:LENGTH", prefill, "1:512"),
    }
    opened = open_backend(backend)
    ceilings = _ceilings(opened, kind, repeats)
    bars = {}
    with torch.inference_mode():
        for name, load in loads.items():
            for rows, length in load:
                result = _measure(opened, shape, kind, rows, length, name == "decode", provider, repeats, ceilings)
                emit(
                    "attention",
                    {"kind": name, "rows": rows, "context": length, "heads": heads, "head_dim": head_dim,
                     "block_size": block_size, "dtype": dtype},
                    {**result, "ceilings": ceilings},
                    device={"backend": opened.name, "name": opened.device.name},
                )  # fmt: skip
                bars[f"{name} {rows} × {length}"] = 100 * result["share_of_ceiling"]
    if plot is not None:
        plot_bars(plot, f"attention on {opened.device.name}, share of the measured ceiling", "%", bars)


def _time(opened: Backend, work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``work`` on the device."""
    device = opened.device
    for _ in range(3):
        work()
    device.synchronize()
    times = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        device.synchronize()
        times.append(perf_counter() - started)
    return statistics.median(times)


def _ceilings(opened: Backend, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """GB/s of a copy (read and written bytes counted) and of a read alone, TFLOP/s of a square product."""
    import torch

    where = opened.device.torch_device
    host = where.type == "cpu"
    source = torch.randn((16 if host else 256) << 20, device=where)
    target = torch.empty_like(source)
    moved = source.numel() * source.element_size()
    copy = 2 * moved / _time(opened, lambda: target.copy_(source), repeats) / 1e9
    read = moved / _time(opened, source.sum, repeats) / 1e9
    size = 512 if host else 8192
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    product = 2 * size**3 / _time(opened, lambda: a @ b, repeats) / 1e12
    return {"copy_GB_s": round(copy, 2), "read_GB_s": round(read, 2), "product_TFLOP_s": round(product, 4)}


def _measure(
    opened: Backend,
    shape: Shape,
    dtype: torch.dtype,
    rows: int,
    length: int,
    decode: bool,
    provider: str | None,
    repeats: int,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    import torch

    from dougong.hal import AttentionQuery, AttentionSpec, BatchView, KVGroup, LayerArgs, Limits
    from dougong.hal.reference.attention import ReferenceAttention

    device, where = opened.device, opened.device.torch_device
    layout = opened.layouts()[0]
    spec = AttentionSpec(num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.dim, dtype=dtype)
    query = AttentionQuery(spec=spec, layout=layout, block_size=shape.block)
    choice = opened.choose_attention(query, provider)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=shape.block, kernel_block=shape.block)
    width = math.ceil(length / shape.block)
    queries = 1 if decode else length
    limits = Limits(max_rows=rows, max_tokens=rows * queries, max_kv_len=length, max_blocks=width)
    cache = device.empty_cache(group, rows * width + 1)
    for plane in cache.planes.values():
        plane.copy_(torch.randn(plane.shape).to(dtype))
    table = (torch.randperm(rows * width) + 1).reshape(rows, width).to(torch.int32)
    slots = torch.zeros(rows * queries, dtype=torch.int64, device=where)
    batch = BatchView.build([queries] * rows, [length] * rows, table, shape.block, where, slots=slots)
    q = torch.randn(rows * queries, shape.heads, shape.dim).to(where, dtype)
    out, want = torch.empty_like(q), torch.empty_like(q)
    kernel = choice.target(spec, group, limits, device)
    plan = kernel.new_plan()
    kernel.plan(batch, plan)
    kernel.run(plan, LayerArgs(), q, cache, out=out)
    reference = ReferenceAttention(spec, group, limits, device)
    expected = reference.new_plan()
    reference.plan(batch, expected)
    reference.run(expected, LayerArgs(), q, cache, out=want)
    error = float((out.float() - want.float()).norm() / want.float().norm())
    seconds = _time(opened, lambda: kernel.run(plan, LayerArgs(), q, cache, out=out), repeats)
    moved = rows * length * spec.bytes_per_token()
    operations = 4 * rows * queries * length * shape.heads * shape.dim * (1 if decode else 0.5)
    bandwidth, rate = moved / seconds / 1e9, operations / seconds / 1e12
    ceiling = max(ceilings["copy_GB_s"], ceilings["read_GB_s"])
    # The floor is the larger of the two times: bytes over bandwidth, operations over the product's rate.
    floor = max(moved / ceiling / 1e9, operations / ceilings["product_TFLOP_s"] / 1e12)
    return {
        "provider": choice.spec.provider,
        "us": round(seconds * 1e6, 2),
        "GB_s": round(bandwidth, 2),
        "TFLOP_s": round(rate, 4),
        "share_of_ceiling": round(floor / seconds, 4),
        "relative_error": error,
    }
