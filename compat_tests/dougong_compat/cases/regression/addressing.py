"""A. Addressing: offsets past 2^31, strides taken for granted, pages read from the wrong place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import Entry

__all__ = ["collect"]

#: A cache whose third block lies past 2^31 elements.
_GIANT: dict[str, Any] = {"layout": "nhd", "block": 16, "stride": "giant", "spare": 0, "D": 128, "H": 4, "K": 1}
#: A cache whose blocks step over 2^31 elements at the fourth.
_WIDE: dict[str, Any] = {**_GIANT, "stride": "wide"}


def collect() -> Iterator[Case]:
    one = Entry(1, "vllm-1486-slot-offset-overflow", "vllm-project/vllm", 1486)
    yield one.call("decode", "needle", rows=[[1, 20]], **_GIANT)
    yield one.call("prefill", "needle", rows=[[20, 20]], **_GIANT)
    yield one.call("write", "write", rows=[[1, 20]], slots="last", **_GIANT)
    two = Entry(2, "vllm-47671-mla-page-stride", "vllm-project/vllm", 47671)
    latent: dict[str, Any] = {
        "D": 576,
        "Dv": 512,
        "H": 4,
        "K": 1,
        "latent": True,
        "layout": "nhd",
        "block": 16,
        "spare": 0,
    }
    yield two.call("decode", rows=[[1, 70]], stride="wide", **latent)
    three = Entry(3, "vllm-50427-gather-below-the-cache", "vllm-project/vllm", 50427)
    yield three.call("decode", "needle", rows=[[1, 75]], **_WIDE)
    yield three.call("extend", "needle", rows=[[6, 80]], **_WIDE)
    four = Entry(4, "aiter-4774-blocks-past-int32-score-zero", "ROCm/aiter", 4774)
    for kv in ("", "int8"):
        yield four.call(f"long{kv}", rows=[[1, 75]], kv=kv, **_WIDE)
    five = Entry(5, "aiter-4673-span-not-numel", "ROCm/aiter", 4673)
    yield five.call("giant", "needle", rows=[[1, 9], [1, 17]], **_GIANT)
    for stride in ("gap", "layers"):
        yield five.call(
            stride, "needle", rows=[[1, "2b+1"], [1, "b"]], layout="nhd", block=16, stride=stride, D=64, H=4, K=1
        )
    six = Entry(6, "aiter-3211-block-id-16-bits", "ROCm/aiter", 3211)
    yield six.call("block1", "needle", rows=[[1, 40], [1, 9]], block=1, spare=70000, D=64, H=2, K=1)
    yield six.call("own", "needle", rows=[[1, "5b"], [1, 9]], spare=70000, D=64, H=2, K=1, profile="full")
    seven = Entry(7, "flashinfer-3136-page-stride-wraps", "flashinfer-ai/flashinfer", 3136)
    yield seven.call("decode", rows=[[1, 40]], stride="giant", **latent)
    eight = Entry(8, "vllm-xpu-kernels-445-packed-layers", "vllm-project/vllm-xpu-kernels", 445)
    for batch, rows in (("decode", [[1, 61], [1, 5]]), ("extend", [[5, 61]])):
        yield eight.call(f"wide-{batch}", rows=rows, **_WIDE)
        yield eight.call(f"layers-{batch}", rows=rows, layout="nhd", stride="layers", block=16, spare=300)
    ten = Entry(10, "aiter-3498-interleaved-block-stride", "ROCm/aiter", 3498)
    for block in (16, 32, 64):
        yield ten.call(
            f"n{block}", "needle", rows=[[1, "2b+3"], [4, "b+4"]], layout="nhd", block=block, stride="interleaved", D=64
        )
    eleven = Entry(11, "flashinfer-1865-packed-q-strides", "flashinfer-ai/flashinfer", 1865)
    for batch, rows in (("decode", [[1, 33], [1, 7]]), ("prefill", [[19, 19], [6, 6]]), ("extend", [[5, 40]])):
        for D in (64, 128, 256):
            yield eleven.call(f"{batch}-d{D}", rows=rows, D=D, q_pack=True, H=8, K=2)
    twelve = Entry(12, "vllm-47056-kernel-block-is-not-manager-block", "vllm-project/vllm", 47056)
    for factor in (2, 4):
        yield twelve.call(f"x{factor}", "roundtrip", rows=[[1, "3b+1"], [3, "2b"]], manager=factor, H=4, K=1)
    thirteen = Entry(13, "flashinfer-3022-small-page-large-head", "flashinfer-ai/flashinfer", 3022)
    for block in (8, 16, 32, 64):
        for D in (128, 256):
            yield thirteen.call(f"n{block}-d{D}", "needle", rows=[[1, "3b+1"], [5, "2b"]], block=block, D=D, H=4, K=1)
    fourteen = Entry(14, "fa-1795-scalar-seqlens", "Dao-AILab/flash-attention", 1795)
    yield fourteen.call("equal-lengths", rows=[[1, 23]] * 5, spare=40, H=4, K=1)
    yield fourteen.call("one-row", rows=[[1, 23]], spare=40, H=4, K=1)
    fifteen = Entry(15, "vllm-gaudi-1546-identity-pages", "vllm-project/vllm-gaudi", 1546)
    yield fifteen.variants(
        "renamed",
        {"rows": [[1, "3b"], [1, "2b+1"], [4, "b+4"]], "identity": True, "H": 4, "K": 1},
        [
            {"params": {"identity": False}, "name": "shuffled blocks"},
            {"params": {"identity": False, "page_seed": 3}, "name": "other blocks"},
        ],
    )
    sixteen = Entry(16, "aiter-3032-table-out-of-bounds", "ROCm/aiter", 3032)
    for width in (0, 1):
        tight: dict[str, list[list[int | str]]] = {
            "decode": [[1, "b"], [1, "2b"]],
            "mixed": [[1, "b+1"], [3, "3b"]],
            "prefill": [[17, 17]],
        }
        for batch, lengths in tight.items():
            yield sixteen.call(f"{batch}-w{width}", rows=lengths, guard=True, width=width, H=4, K=1)
    seventeen = Entry(17, "fa-e3b2400a-paged-v-dim", "Dao-AILab/flash-attention", "e3b2400a")
    for D, Dv in ((192, 128), (64, 32), (128, 64)):
        yield seventeen.call(f"{D}-{Dv}", "needle", rows=[[1, "2b+1"], [3, "b+3"]], D=D, Dv=Dv, H=4, K=1)
    eighteen = Entry(18, "dlinfer-6236044-decode-batch", "DeepLink-org/dlinfer", "6236044")
    for count in (1, 2, 3, 5, 9):
        yield eighteen.call(f"batch{count}", "needle", rows=[[1, 11 + 7 * i] for i in range(count)], D=128, H=4, K=1)
