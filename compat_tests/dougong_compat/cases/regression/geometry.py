"""D and E. Head geometry, and features silently dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import Entry

__all__ = ["collect"]

_SMALL: dict[str, Any] = {"H": 4, "K": 1}
_FP8: dict[str, Any] = {"kv": "float8_e4m3fn", "H": 4, "K": 1}


def collect() -> Iterator[Case]:
    yield from _geometry()
    yield from _dropped()


def _geometry() -> Iterator[Case]:
    a = Entry(41, "flashinfer-1614-group-of-seven", "flashinfer-ai/flashinfer", 1614)
    for H, K in ((7, 1), (14, 2), (3, 1), (12, 1), (6, 2)):
        for batch, rows in (("split", [[1, 700]]), ("decode", [[1, 40], [1, 9]]), ("extend", [[9, 40]])):
            yield a.call(f"{H}over{K}-{batch}", rows=rows, H=H, K=K, lse=batch == "split")
    a = Entry(42, "llama-cpp-20031-odd-dims-and-48-slopes", "ggml-org/llama.cpp", 20031)
    for D in (40, 72, 112):
        yield a.call(f"d{D}", rows=[[1, 33], [4, 20]], D=D, **_SMALL)
    yield a.call("alibi48-fp16", rows=[[1, 33], [4, 20]], H=48, K=48, D=32, alibi=True, dtype="float16")
    yield a.call("alibi48", rows=[[1, 33], [4, 20]], H=48, K=12, D=32, alibi=True)
    a = Entry(43, "vllm-metal-292-heads-and-block-544", "vllm-project/vllm-metal", 292)
    yield a.call("block544", "needle", rows=[[1, 545], [3, 30]], block=544, D=128, H=4, K=1)
    yield a.call("block544-mean", rows=[[1, 545], [1, 540]], block=544, values="flat", **_SMALL)
    for K in (1, 2, 4, 8):
        yield a.call(f"kv-heads{K}", "needle", rows=[[1, 20], [3, 30]], D=128, H=8, K=K)
    a = Entry(44, "fa-2470-zero-lengths", "Dao-AILab/flash-attention", 2470)
    for name, rows in {
        "empty-batch": [], "one-empty": [[0, 0]], "all-empty": [[0, 5], [0, 0], [0, 17]],
        "no-keys": [[2, 0], [1, 0]], "between": [[1, 5], [0, 9], [3, 3], [0, 0]], "trailing": [[3, 20], [0, 0], [0, 0]],
    }.items():  # fmt: skip
        yield a.call(name, rows=rows, **_SMALL)
        yield a.call(f"{name}-lse", rows=rows, lse=True, **_SMALL)
    a = Entry(45, "flashinfer-1930-max-q-len", "flashinfer-ai/flashinfer", 1930)
    yield a.call("uneven", rows=[[2, 2], [33, 33], [3, 3]], **_SMALL)
    yield a.call("many", rows=[[2, 9]] * 9, **_SMALL)


def _dropped() -> Iterator[Case]:
    a = Entry(46, "sglang-33915-softcap-dropped", "sgl-project/sglang", 33915)
    for cap in (0.5, 3.0, 50.0):
        for q in (1, 6):
            yield a.call(f"cap{cap:g}-q{q}", rows=[[q, 40], [q, 9]], softcap=cap, values="sharp", **_SMALL)
    a = Entry(47, "vllm-57614-alibi-and-page-32", "vllm-project/vllm", 57614)
    for block in (16, 32):
        for q in (1, 6):
            yield a.call(f"n{block}-q{q}", rows=[[q, 40], [q, 9]], alibi=True, block=block, H=8, K=2)
    a = Entry(48, "rocm-libraries-12227-sink-per-split", "ROCm/rocm-libraries", 12227)
    for batch, rows in (
        ("split", [[1, 900]]),
        ("decode", [[1, 40], [1, 1]]),
        ("extend", [[6, 300]]),
        ("empty", [[1, 0], [3, 2]]),
    ):
        yield a.call(batch, rows=rows, sinks=True, lse=True, **_SMALL)
        yield a.call(f"{batch}-window", rows=rows, sinks=True, window=11, **_SMALL)
    a = Entry(49, "flashinfer-4014-stale-scale", "flashinfer-ai/flashinfer", 4014)
    for q in (1, 5):
        yield a.variants(
            f"q{q}",
            {"rows": [[q, 30]], "scale": 0.1, **_SMALL},
            [
                {"params": {"scale": s}, "mode": "oracle", "name": f"the same shapes with scale {s}"}
                for s in (0.5, 0.02)
            ],
        )
        yield a.variants(
            f"q{q}-softcap", {"rows": [[q, 30]], "softcap": 2.0, "values": "sharp", **_SMALL},
            [{"params": {"softcap": s}, "mode": "oracle", "name": f"softcap {s}"} for s in (5.0, None)],
        )  # fmt: skip
    a = Entry(50, "vllm-42580-descale-dropped", "vllm-project/vllm", 42580)
    for k_scale, v_scale in ((0.25, 1.0), (1.0, 3.0), (0.5, 0.125)):
        for q in (1, 6):
            yield a.call(
                f"k{k_scale:g}-v{v_scale:g}-q{q}", rows=[[q, 40], [q, 9]], k_scale=k_scale, v_scale=v_scale, **_FP8
            )
        yield a.call(
            f"tensor-k{k_scale:g}", rows=[[1, 40]], k_scale=k_scale, v_scale=v_scale, scale_tensor=True, **_FP8
        )
    for dtype in ("bfloat16", "float16"):  # a cache in the model's dtype has no scale to apply
        yield a.call(f"unscaled-{dtype}", rows=[[1, 40], [3, 9]], dtype=dtype, k_scale=0.25, v_scale=3.0, **_SMALL)
    a = Entry(51, "aiter-4051-fn-is-not-fnuz", "ROCm/aiter", 4051)
    yield a.call("read", rows=[[1, 40], [3, 9]], values="fp8_edge", **_FP8)
    yield a.call("write", "write", rows=[[1, 20]], spread=300.0, slots="scattered", **_FP8)
    yield a.call("saturates", rows=[[1, 300]], values="flat", **_FP8)
    a = Entry(52, "openvino-29100-int8-odd-heads", "openvinotoolkit/openvino", 29100)
    for D in (40, 72, 80, 96):
        yield a.call(f"d{D}", rows=[[1, 40], [3, 9]], D=D, kv="int8", k_scale=0.03, v_scale=0.03, write=True, **_SMALL)
