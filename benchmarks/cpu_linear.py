"""What do a model's linear layers alone allow on this processor, by weight format, batch and library?

The layers are those of a Llama-like model (SmolLM2-135M by default), with random weights, logits layer included; each
layer's weights are its own, so that caches help no more than they do in a model. Prints one JSON line per
combination. Formats of dougong-cpu and torch's own products are measured in turns, in one process.

    python benchmarks/cpu_linear.py --rows 1 8 16 512 --formats int4 torch_int4 bf16 torch_bf16
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from dougong_cpu import packing, threads
from dougong_cpu._values import DTYPES
from dougong_cpu.library import load

Product = Callable[[torch.Tensor], torch.Tensor]


def own(packed: packing.PackedWeight, dtype: torch.dtype) -> tuple[Product, int]:
    product = load().product
    packed.call.x_dtype = packed.call.y_dtype = DTYPES[dtype]

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty((x.shape[0], packed.shape[0]), dtype=dtype)
        product(packed.address, x.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0), threads.count)
        return y

    return call, packed.nbytes


def make(name: str, weight: torch.Tensor) -> tuple[Product, int, torch.dtype]:
    """(product, bytes of weight, dtype of activations) of a format."""
    n, k = weight.shape
    f32, bf16 = torch.float32, torch.bfloat16
    if name == "int4":
        return *own(packing.pack_int4(*packing.quantize_int4(weight)), f32), f32
    if name == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return *own(packing.pack_int8((weight / scale).round().to(torch.int8), scale), f32), f32
    if name in ("bf16", "bf16_f32"):
        packed = packing.pack_dense(weight.to(bf16))
        return *own(packed, bf16 if name == "bf16" else f32), bf16 if name == "bf16" else f32
    if name == "f32":
        return *own(packing.pack_dense(weight), f32), f32
    if name == "torch_int4":
        codes = torch.randint(0, 15, (n, k), dtype=torch.int32)
        packed4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.randn(k // 32, n, 2).to(bf16)
        nbytes = n * k // 2 + scales.numel() * 2
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed4, 32, scales), nbytes, bf16
    if name == "torch_int8":
        codes8, scale8 = torch.randint(-127, 127, (n, k), dtype=torch.int8), torch.randn(n).to(bf16)
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes8, scale8), n * k, bf16
    dtype = {"torch_bf16": bf16, "torch_f32": f32}[name]
    kept = weight.to(dtype)
    return lambda x: F.linear(x, kept), kept.numel() * kept.element_size(), dtype


def shapes(hidden: int, heads: int, kv_heads: int, dim: int, inner: int) -> list[tuple[int, int]]:
    return [((heads + 2 * kv_heads) * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)]


def ceilings() -> tuple[float, float]:
    """(bytes/s read from memory, FLOP/s of a large float32 product), the best of five."""
    wide, square = torch.ones(2**26), torch.ones(1536, 1536)
    read = min(timed(lambda: wide.sum()) for _ in range(5))
    product = min(timed(lambda: square @ square) for _ in range(5))
    return wide.numel() * 4 / read, 2 * 1536**3 / product


def timed(call: Callable[[], object]) -> float:
    start = time.thread_time() if threads.count == 1 else time.perf_counter()
    call()
    return (time.thread_time() if threads.count == 1 else time.perf_counter()) - start


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    layers = shapes(576, 9, 3, 64, 1536)
    bandwidth, flops = ceilings()
    models = {}
    for name in arguments.formats:
        models[name] = (
            [[make(name, torch.randn(shape) * 0.02) for shape in layers] for _ in range(arguments.layers)],
            make(name, torch.randn(arguments.vocabulary, 576) * 0.02),
        )
    for rows in arguments.rows:
        best: dict[str, float] = {}
        for _ in range(arguments.repeat):
            for name, (blocks, head) in models.items():  # in turns: a busy moment hits all alike
                inputs = {k: torch.randn(rows, k).to(head[2]) for k in (576, 1536)}
                ends = inputs[576] if rows <= 64 else inputs[576][:1]  # a prompt needs its last token's logits only

                def step(blocks=blocks, head=head, inputs=inputs, ends=ends) -> None:  # type: ignore[no-untyped-def]
                    for block in blocks:
                        for (product, _, _), (_, k) in zip(block, layers, strict=True):
                            product(inputs[k])
                    head[0](ends)

                best[name] = min(best.get(name, 1e9), timed(step))
        for name, seconds in best.items():
            blocks, head = models[name]
            nbytes = sum(part[1] for block in blocks for part in block) + head[1]
            work = 2 * rows * arguments.layers * sum(n * k for n, k in layers)
            work += 2 * min(rows, rows if rows <= 64 else 1) * arguments.vocabulary * 576
            floor = max(nbytes / bandwidth, work / flops)
            yield {
                "format": name, "rows": rows, "ms": round(seconds * 1e3, 2), "tokens_per_s": round(rows / seconds, 1),
                "share_of_floor": round(floor / seconds, 3), "weight_mib": round(nbytes / 2**20, 1),
                "read_gb_s": round(bandwidth / 1e9, 1), "product_gflop_s": round(flops / 1e9, 1),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 512])
    parser.add_argument(
        "--formats", nargs="+", default=["int4", "torch_int4", "int8", "torch_int8", "bf16", "torch_bf16"]
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    threads.refresh()
    about = {
        "machine": platform.machine(), "isa": load().isa, "torch": torch.__version__, "threads": arguments.threads,
        "date": datetime.date.today().isoformat(), "clock": "cpu time" if arguments.threads == 1 else "wall",
    }  # fmt: skip
    with torch.inference_mode():
        for line in measure(arguments):
            print(json.dumps({**about, **line}), flush=True)


if __name__ == "__main__":
    main()
