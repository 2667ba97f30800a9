"""C. Masks and positions: one key too many, one too few, chunks and prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import Entry

__all__ = ["collect"]

_SMALL: dict[str, Any] = {"H": 4, "K": 1}
_NEEDLE: dict[str, Any] = {"H": 4, "K": 1, "D": 128}
_MLA: dict[str, Any] = {"D": 576, "Dv": 512, "H": 2, "K": 1, "latent": True, "layout": "nhd", "block": 16}


def collect() -> Iterator[Case]:
    a = Entry(29, "flashinfer-3717-tail-joins-the-softmax", "flashinfer-ai/flashinfer", 3717)
    for length in (15, 16, 17, 31, 48):
        yield a.call(f"kv{length}", "needle", rows=[[1, length]], causal=False, decoy="stale", **_NEEDLE)
    a = Entry(30, "vllm-26042-mla-chunked-prefill", "vllm-project/vllm", 26042)
    for chunk in (5, 16):
        yield a.variants(
            f"by{chunk}",
            {**_MLA, "rows": [[40, 40]], "write": True},
            [
                {
                    "params": {"rows": [[min(chunk, 40 - at), min(40, at + chunk)]]},
                    "mode": "oracle",
                    "name": f"chunk at {at}",
                }
                for at in range(0, 40, chunk)
            ],
        )
    a = Entry(31, "sglang-22688-empty-chunk-of-a-short-prefix", "sgl-project/sglang", 22688)
    yield a.call("mla", rows=[[4, 4], [3, 37], [2, 2], [5, 6]], **_MLA)
    yield a.call("plain", rows=[[4, 4], [3, 37], [2, 2], [5, 6]], **_SMALL)
    a = Entry(32, "local-inference-lab-vllm-17-merge-strides", "local-inference-lab/vllm", 17)
    for strided in ("a", "b", "both"):
        yield a.case(
            strided, "L1", "op", ("op:merge_lse",), op="merge_lse", T=7, H=3, D=64, dtype="own", strided=strided
        )
    a = Entry(33, "sglang-22819-prefix-is-one-block", "sgl-project/sglang", 22819)
    for q in (1, 2, 7, 17):
        yield a.call(f"q{q}", "needle", rows=[[q, f"b+{q}"]], **_NEEDLE)
        yield a.call(f"q{q}-hit", rows=[[q, f"2b+{q}"]], shared=0, write=True, **_SMALL)
    a = Entry(34, "vllm-ascend-11508-chunk-counted-twice", "vllm-project/vllm-ascend", 11508)
    yield a.variants(
        "three-chunks",
        {"rows": [[40, 40]], "write": True, **_SMALL},
        [
            {"params": {"rows": [[q, kv]]}, "mode": "oracle", "name": f"{q} of {kv}"}
            for q, kv in ((13, 13), (13, 26), (14, 40))
        ],
    )
    a = Entry(35, "transformers-29623-window-off-by-one", "huggingface/transformers", 29623)
    for window in (15, 16, 17, 33):
        for off in (0, 1, 2):
            yield a.call(
                f"w{window}+{off}", "needle", rows=[[1, window + off]], window=window, decoy="window", **_NEEDLE
            )
        yield a.call(f"w{window}-q4", "needle", rows=[[4, window + 9]], window=window, decoy="window", **_NEEDLE)
    a = Entry(36, "sglang-26516-window-ignored", "sgl-project/sglang", 26516)
    for D in (32, 64):
        for rows in ([[1, 70]], [[5, 70]]):
            yield a.call(f"d{D}-q{rows[0][0]}", rows=rows, window=9, D=D, **_SMALL)
    a = Entry(37, "flashinfer-3682-fp8-window-deadlock", "flashinfer-ai/flashinfer", 3682)
    for length in (127, 129, 300):
        yield a.call(f"kv{length}", rows=[[1, length], [9, length]], window=40, kv="float8_e4m3fn", **_SMALL)
    a = Entry(38, "flashinfer-4401-finite-sentinel", "flashinfer-ai/flashinfer", 4401)
    for q in (1, 6):
        yield a.call(
            f"fp32-q{q}", rows=[[q, "b+5"], [q, 9]], values="cold", scale=1.0, dtype="float32", lse=q == 1, **_SMALL
        )
        yield a.call(f"bf16-q{q}", rows=[[q, "b+5"], [q, 9]], values="cold", scale=1.0, dtype="bfloat16", **_SMALL)
        yield a.call(f"fp16-q{q}", rows=[[q, "b+5"], [q, 9]], values="cold_half", scale=1.0, dtype="float16", **_SMALL)
    a = Entry(39, "llama-cpp-14505-mask-broadcast", "ggml-org/llama.cpp", 14505)
    yield a.call("rows-differ", "needle", rows=[[3, 4], [3, "b+9"], [3, 3]], **_NEEDLE)
    yield a.call("heads-differ", rows=[[3, 4], [3, "b+9"]], alibi=True, H=6, K=2)
    a = Entry(40, "vllm-ascend-12605-no-mask-in-decode", "vllm-project/vllm-ascend", 12605)
    for draft in (1, 2, 3, 4):
        yield a.call(f"draft{draft}", "needle", rows=[[1, 20], [1 + draft, 30], [1 + draft, 1 + draft]], **_NEEDLE)
