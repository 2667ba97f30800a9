"""Every kernel that serving launches, with arguments as they are on each target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dougong_kernels.compile.targets import Target
from dougong_kernels.config import configs_for
from dougong_kernels.paged import PagedAttention, Shape
from dougong_kernels.triton import draw, extend, planning, pointwise, rotate, skinny, split

__all__ = ["Launch", "launches"]


@dataclass(frozen=True)
class Launch:
    """``args`` as ``build.compile_for`` takes them. ``core``: checked by every `make prove`; the rest, which differ in
    little, when asked for."""

    name: str
    kernel: Any
    args: dict[str, Any]
    core: bool


_STRIDES = ("qt", "qh", "kb", "kn", "kh", "vb", "vn", "vh", "ot", "oh", "lt")
_PLAIN = Shape(num_heads=32, num_kv_heads=8, head_dim=128, head_dim_v=128, block_size=16, scale=0.1)
_FEATURES = replace(_PLAIN, head_dim=64, head_dim_v=64, window=9, softcap=2.0, alibi=True, sinks=True)
_LATENT = replace(_PLAIN, num_heads=16, num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True)


def launches(target: Target) -> Iterator[Launch]:
    """Attention in its variants first, then what stands around it."""
    yield from _attention_variants(target)
    yield from _around(target)


def _attention_variants(target: Target) -> Iterator[Launch]:
    other_fp8 = "fp8e4nv" if target.native_fp8 == "fp8e4nv" else "u8"
    ocp = replace(_PLAIN, head_dim=96, head_dim_v=96, fp8=1 if other_fp8 == "fp8e4nv" else 2)
    yield from _attention(target, "d128", _PLAIN, core="both")
    yield from _attention(target, "d64 features", _FEATURES, dtype="fp16", core="both")
    yield from _attention(target, "d256", replace(_PLAIN, head_dim=256, head_dim_v=256), core="extend")
    yield from _attention(target, "d96 fp8", ocp, kv=other_fp8, core="split")
    yield from _attention(target, "int8", _PLAIN, kv="i8")
    yield from _attention(target, "latent", _LATENT, core="both")
    yield from _attention(target, "ragged", replace(_PLAIN, block_size=0, causal=False))
    yield from _attention(target, "fp32 d64", replace(_PLAIN, head_dim=64, head_dim_v=64, upcast=True), dtype="fp32")
    yield from _attention(target, "invariant", _PLAIN, invariant=True)
    if target.backend == "hip":
        native = target.native_fp8 == "fp8e4b8"
        fnuz = replace(_PLAIN, fp8=1 if native else 3)
        yield from _attention(
            target, "fnuz", fnuz, kv="fp8e4b8" if native else "u8", core="split" if native else "none"
        )
        yield from _attention(target, "packed", replace(_PLAIN, pack_k=8, pack_v=1), core="split", same=False)


def _attention(
    target: Target,
    label: str,
    s: Shape,
    *,
    dtype: str = "bf16",
    kv: str = "",
    core: str = "none",
    invariant: bool = False,
    same: bool = True,
) -> Iterator[Launch]:
    kv = kv or dtype
    width = max(s.head_dim, s.head_dim_v)
    settings = configs_for(target.name, width, latent=s.latent, wide=kv == dtype, exact=dtype == "fp32")
    paged = PagedAttention(
        s, max_rows=4, max_tokens=64, max_kv_len=4096, cores=4, device="cpu", settings=settings,
        batch_invariant=invariant,
    )  # fmt: skip
    scales = kv != dtype
    args: dict[str, Any] = dict.fromkeys(("q", "out"), f"*{dtype}") | dict.fromkeys("kv", f"*{kv}")
    args |= {f"stride_{name}": "i32" for name in _STRIDES}
    args |= dict.fromkeys(("prefix", "starts", "rows", "items", "counters"), "*i32")
    args |= dict.fromkeys(("ws_acc", "ws_lse", "lse"), "*fp32")
    args |= dict(
        head="*i64", kv_start=None if s.block_size else "*i32", k_scale="*fp32" if scales else None,
        v_scale="*fp32" if scales else "fp32", sinks="*fp32" if s.sinks else None,
        slopes="*fp32" if s.alibi else None, scale="fp32", softcap="fp32", window="i32", max_items="i32",
    )  # fmt: skip
    both = paged.constants(paged.many, 1, scales=scales, lse=True, same=same)
    for part, kernel, constants in zip(("split", "extend"), (split.split_kernel, extend.extend_kernel), both):
        yield Launch(f"{part} {label}", kernel, args | constants, core in (part, "both"))
    if paged.few is not paged.many:
        few, _ = paged.constants(paged.few, 1, scales=scales, lse=True, same=same)
        yield Launch(f"split few {label}", split.split_kernel, args | few, core=False)


def _strides(names: str) -> dict[str, str]:
    return {f"stride_{name}": "i32" for name in names.split()}


def _around(target: Target) -> Iterator[Launch]:
    yield Launch("plan", planning.plan_kernel, dict(
        dict.fromkeys(("cu_q", "kv_len", "table", "prefix", "tiles", "starts", "rows", "items"), "*i32"),
        **dict.fromkeys(("num_rows", "short", "groups", "programs", "min_units", "half_below", "unit_tiles", "width",
                         "extend_tokens", "keys", "window"), "i32"),
        head="*i64", CAUSAL=True, WINDOW=False, STEPS=9, BLOCK=256, num_warps=2,
    ), core=True)  # fmt: skip
    for label, kind, cache, pack in (("", 0, "bf16", 0), (" int8", 1, "i8", 0), (" fp8", 2, "u8", 0),
                                     (" fnuz packed", 3, "u8", 16)):  # fmt: skip
        yield Launch(f"rotate{label}", rotate.rotate_write_kernel, dict(
            dict.fromkeys(("q", "k", "v", "q_out", "q_norm", "k_norm"), "*bf16"),
            **_strides("qt qh kt kh vt vh ot oh cb cn ch wb wn wh p"),
            k_cache=f"*{cache}", v_cache=f"*{cache}", slots="*i64", positions="*i64", cos_sin="*fp32", k_scale="*fp32",
            v_scale="*fp32", offset="fp32", eps="fp32", H=16, K=8, D=128, DV=128, R=64, HALF=32, REST=64, RESTV=128,
            HEADS=4, PAGE=16, Q_NORM=True, K_NORM=True, OFFSET=kind == 1, INTERLEAVED=kind == 2, KIND=kind,
            SCALES=True, WRITE=True, WRITE_V=True, PACK_K=pack, PACK_V=min(pack, 1), num_warps=2,
        ), core=kind == 0 or (kind == 3 and target.name == "gfx942"))  # fmt: skip
    for add in (False, True):
        yield Launch("add norm" if add else "norm", pointwise.rms_norm_kernel, dict(
            dict.fromkeys(("x", "residual", "y", "total", "weight"), "*bf16"), eps="fp32", offset="fp32",
            **_strides("x r y t"), E=1024, BLOCK=1024, ADD=add, OFFSET=add, num_warps=4,
        ), core=True)  # fmt: skip
    for gelu in (False, True):
        args = dict(gate_up="*bf16", out="*bf16", stride_g="i32", I=3072, GELU=gelu, BLOCK=1024, num_warps=4)
        yield Launch("gated gelu" if gelu else "gated silu", pointwise.gated_kernel, args, core=True)
    yield Launch("merge", pointwise.merge_kernel, dict(
        a="*bf16", lse_a="*fp32", b="*bf16", lse_b="*fp32", out="*bf16", lse="*fp32", **_strides("at ah bt bh la lb"),
        H=32, DV=128, BLOCK=128, num_warps=2,
    ), core=True)  # fmt: skip
    for masked, parts in ((False, 64), (True, 1)):
        yield Launch("choose masked" if masked else "choose", draw.choose_kernel, dict(
            logits="*fp32", temperature="*fp32", threshold="*fp32", seeds="*i64", positions="*i64", partial="*i64",
            counters="*i32", out="*i64", V="i32", stride_l="i32", PARTS=parts, PARTS_P=parts, BLOCK=1024,
            MASKED=masked, num_warps=4,
        ), core=masked)  # fmt: skip
    yield Launch("threshold", draw.threshold_kernel, dict(
        logits="*fp32", temperature="*fp32", top_k="*i64", top_p="*fp32", min_p="*fp32", out="*fp32", V="i32",
        stride_l="i32", TOP_K=True, TOP_P=True, MIN_P=True, BLOCK=2048,
        num_warps=32 if target.backend == "cuda" else 16,
    ), core=True)  # fmt: skip
    for prologue, size, block in ((0, 1024, 1024), (1, 1024, 1024), (2, 3072, 4096), (1, 14336, 4096)):
        yield Launch(f"gemv {prologue} {size}", skinny.gemv_kernel, dict(
            dict.fromkeys(("x", "w", "bias", "residual", "norm", "y"), "*bf16"), O="i32", eps="fp32", offset="fp32",
            **_strides("x w r y"), I=size, M=2, BLOCK_O=4, BLOCK_I=block, PROLOGUE=prologue, OFFSET=False, BIAS=True,
            RESIDUAL=True, num_warps=4,
        ), core=size == 1024)  # fmt: skip
    # As ops.skinny.Cut has them.
    rows, stages = (32, 4) if target.early else (16, 2)
    cuts = [("narrow", rows, 256, 1, stages), ("shared", rows, 256, 4, stages)]
    for label, outputs, inputs, programs, stages in [*cuts, ("wide", 64, 128, 1, 5)] if target.early else cuts:
        work = dict(parts="*fp32", counters="*i32") if programs > 1 else dict(parts=None, counters=None)
        yield Launch(f"skinny {label}", skinny.skinny_kernel, dict(
            dict.fromkeys(("x", "w", "bias", "residual", "y"), "*bf16"), **work, M="i32", O="i32", I="i32",
            **_strides("x w r y"), BLOCK_O=outputs, BLOCK_I=inputs, SPLIT=programs, WHOLE=label != "narrow",
            WEIGHT_LEFT=outputs == 64, BIAS=programs > 1, RESIDUAL=programs > 1, UPCAST=False, STAGES=stages,
            num_warps=4,
        ), core=label == "shared")  # fmt: skip
