"""F. Reduction, merging of parts, numbers at their limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import Entry

__all__ = ["collect"]

_SMALL: dict[str, Any] = {"H": 4, "K": 1}


def collect() -> Iterator[Case]:
    a = Entry(53, "fa-26d7d92f-both-parts-empty", "Dao-AILab/flash-attention", "26d7d92f")
    for empty in ("none", "a", "b", "both", "mixed"):
        yield a.case(
            f"merge-{empty}", "L1", "op", ("op:merge_lse",), op="merge_lse", T=9, H=4, D=64, dtype="own", empty=empty
        )
        yield a.case(
            f"merge-{empty}-fp32", "L1", "op", ("op:merge_lse", "dtype:float32"), op="merge_lse", T=9, H=4, D=64,
            dtype="float32", empty=empty,
        )  # fmt: skip
    yield a.call("kernel", rows=[[1, 0], [1, 900], [1, 0]], lse=True, **_SMALL)
    a = Entry(54, "vllm-fa-87-lse-layout", "vllm-project/flash-attention", 87)
    for H, K in ((8, 2), (6, 1), (4, 4)):
        for rows in ([[1, 700], [1, 40], [1, 3]], [[5, 300], [3, 3]]):
            yield a.call(f"{H}over{K}-q{rows[0][0]}", rows=rows, lse=True, H=H, K=K)
    a = Entry(55, "aiter-4711-empty-split", "ROCm/aiter", 4711)
    for lengths in ((1, 5, 1000), (1000, 1), (0, 700, 2), (129, 257, 513), (64, 128, 256)):
        yield a.call("-".join(map(str, lengths)), rows=[[1, n] for n in lengths], lse=True, **_SMALL)
    yield a.call("window", rows=[[1, 1000], [1, 3]], window=20, **_SMALL)
    a = Entry(56, "llama-cpp-17746-fp16-accumulator", "ggml-org/llama.cpp", 17746)
    for q in (1, 6):
        yield a.call(f"v-q{q}", rows=[[q, 300], [q, 20]], values="huge_v", dtype="float16", **_SMALL)
        yield a.call(f"qk-q{q}", rows=[[q, 60]], values="huge_qk", dtype="float16", scale=0.001, D=128, **_SMALL)
    yield a.call("drift", rows=[[1, 2000]], values="flat", kv="float8_e4m3fn", **_SMALL)
    yield a.call("long", rows=[[1, 4000]], values="flat", **_SMALL)
    a = Entry(57, "aiter-2106-fp8-short-tail", "ROCm/aiter", 2106)
    for tail in (1, 2, 3, 4, 5):
        yield a.call(f"tail{tail}", rows=[[1, f"b+{tail}"], [1, tail]], kv="float8_e4m3fn", **_SMALL)
