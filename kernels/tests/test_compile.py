"""Every kernel compiled for every target without its hardware: shared memory within limits, no spills in the hot ones.

The compiler must run outside the interpreter, so each target is a process of its own. `make prove` only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def launches() -> Any:
    """(name, kernel, arguments for offline.compile_for, for which targets) of everything that serving launches."""
    from dataclasses import replace

    from dougong_kernels.config import configs_for
    from dougong_kernels.paged import PagedAttention, Shape
    from dougong_kernels.triton import draw, extend, planning, pointwise, rotate, skinny, split

    strides = ["qt", "qh", "kb", "kn", "kh", "vb", "vn", "vh", "ot", "oh", "lt"]

    def attention(target: str, s: Shape, dtype: str, kv: str, tokens: int = 1, invariant: bool = False) -> Any:
        width = max(s.head_dim, s.head_dim_v)
        settings = configs_for(target, width, latent=s.latent, wide=kv == dtype, exact=dtype == "fp32")
        paged = PagedAttention(
            s, max_rows=4, max_tokens=64, max_kv_len=4096, cores=4, device="cpu", settings=settings,
            batch_invariant=invariant,
        )  # fmt: skip
        scales = kv != dtype
        shared = dict.fromkeys(("q", "out"), f"*{dtype}") | dict.fromkeys("kv", f"*{kv}")
        shared |= {f"stride_{name}": "i32" for name in strides}
        shared |= dict.fromkeys(("head",), "*i64")
        shared |= dict.fromkeys(("prefix", "starts", "rows", "items", "counters"), "*i32")
        shared |= dict.fromkeys(("ws_acc", "ws_lse"), "*fp32")
        shared |= dict(
            lse="*fp32", kv_start=None if s.block_size else "*i32", k_scale="*fp32" if scales else None,
            v_scale="*fp32" if scales else "fp32", sinks="*fp32" if s.sinks else None,
            slopes="*fp32" if s.alibi else None, scale="fp32", softcap="fp32", max_items="i32",
        )  # fmt: skip
        for kernel, constants in zip(
            (split.split_kernel, extend.extend_kernel),
            paged.constants(paged.many, tokens, scales=scales, lse=True, same=True),
            strict=True,
        ):
            yield kernel, shared | constants

    def of(target: str) -> Any:
        fp8 = "fp8e4nv" if target.startswith("sm") and target != "sm80" else "u8"
        plain = Shape(num_heads=32, num_kv_heads=8, head_dim=128, head_dim_v=128, block_size=16, scale=0.1)
        shapes = {
            "d128": (plain, "bf16", "bf16"),
            "d64 features": (
                replace(plain, head_dim=64, head_dim_v=64, window=9, softcap=2.0, alibi=True, sinks=True),
                "fp16",
                "fp16",
            ),
            "d256": (replace(plain, head_dim=256, head_dim_v=256), "bf16", "bf16"),
            "d96 fp8": (replace(plain, head_dim=96, head_dim_v=96, fp8=1 if fp8 == "fp8e4nv" else 2), "bf16", fp8),
            "int8": (plain, "bf16", "i8"),
            "latent": (
                replace(plain, num_heads=16, num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True),
                "bf16",
                "bf16",
            ),
            "ragged": (replace(plain, block_size=0, causal=False), "bf16", "bf16"),
            "fp32 d64": (replace(plain, head_dim=64, head_dim_v=64, upcast=True), "fp32", "fp32"),
        }
        for name, (shape, dtype, kv) in shapes.items():
            for kernel, args in attention(target, shape, dtype, kv):
                yield f"{kernel.__name__} {name}", kernel, args
        for kernel, args in attention(target, plain, "bf16", "bf16", invariant=True):
            yield f"{kernel.__name__} invariant", kernel, args
        ints = ("num_rows", "short", "groups", "programs", "min_units", "unit_tiles", "width")
        yield "plan", planning.plan_kernel, dict(
            dict.fromkeys(("cu_q", "kv_len", "table", "prefix", "tiles", "starts", "rows", "items"), "*i32"),
            **dict.fromkeys(ints, "i32"), head="*i64", QT_EXTEND=32, BLOCK_N=16, CAUSAL=True, WINDOW=0, STEPS=9,
            BLOCK=256, num_warps=2,
        )  # fmt: skip
        rotate_strides = ["qt", "qh", "kt", "kh", "vt", "vh", "ot", "oh", "cb", "cn", "ch", "wb", "wn", "wh", "p"]
        for kind, cache in ((0, "bf16"), (1, "i8"), (2, "u8")):
            yield f"rotate {kind}", rotate.rotate_write_kernel, dict(
                dict.fromkeys(("q", "k", "v", "q_out", "q_norm", "k_norm"), "*bf16"),
                **{f"stride_{name}": "i32" for name in rotate_strides}, stride_cd=1, stride_wd=1,
                k_cache=f"*{cache}", v_cache=f"*{cache}", slots="*i64", positions="*i64", cos_sin="*fp32",
                k_scale="*fp32", v_scale="*fp32", offset="fp32", eps="fp32", H=16, K=8, D=128, DV=128, R=64, HALF=32,
                REST=64, RESTV=128, HEADS=4, PAGE=16, Q_NORM=True, K_NORM=True, OFFSET=kind == 1, INTERLEAVED=kind == 2,
                KIND=kind, SCALES=True, WRITE=True, WRITE_V=True, num_warps=2,
            )  # fmt: skip
        for add in (False, True):
            yield f"norm {add}", pointwise.rms_norm_kernel, dict(
                dict.fromkeys(("x", "residual", "y", "total", "weight"), "*bf16"), eps="fp32", offset="fp32",
                **{f"stride_{name}": "i32" for name in "xryt"}, E=1024, BLOCK=1024, ADD=add, OFFSET=add, num_warps=4,
            )  # fmt: skip
        for gelu in (False, True):
            yield (
                f"gated {gelu}",
                pointwise.gated_kernel,
                dict(gate_up="*bf16", out="*bf16", stride_g="i32", I=3072, GELU=gelu, BLOCK=1024, num_warps=4),
            )
        yield "merge", pointwise.merge_kernel, dict(
            a="*bf16", lse_a="*fp32", b="*bf16", lse_b="*fp32", out="*bf16", lse="*fp32",
            **{f"stride_{name}": "i32" for name in ["at", "ah", "bt", "bh", "la", "lb"]}, H=32, DV=128, BLOCK=128,
            num_warps=2,
        )  # fmt: skip
        for masked, parts in ((False, 64), (True, 1)):
            yield f"choose {masked}", draw.choose_kernel, dict(
                logits="*fp32", temperature="*fp32", threshold="*fp32", seeds="*i64", positions="*i64", partial="*i64",
                counters="*i32", out="*i64", V="i32", stride_l="i32", PARTS=parts, PARTS_P=parts, BLOCK=1024,
                MASKED=masked, num_warps=4,
            )  # fmt: skip
        yield "threshold", draw.threshold_kernel, dict(
            logits="*fp32", temperature="*fp32", top_k="*i64", top_p="*fp32", min_p="*fp32", out="*fp32", V="i32",
            stride_l="i32", TOP_K=True, TOP_P=True, MIN_P=True, BLOCK=2048,
            num_warps=32 if target.startswith("sm") else 16,
        )  # fmt: skip
        for prologue, size, block in ((0, 1024, 1024), (1, 1024, 1024), (2, 3072, 4096), (1, 14336, 4096)):
            yield f"gemv {prologue} {size}", skinny.gemv_kernel, dict(
                dict.fromkeys(("x", "w", "bias", "residual", "norm", "y"), "*bf16"), O="i32", eps="fp32", offset="fp32",
                **{f"stride_{name}": "i32" for name in "xwry"}, I=size, M=2, BLOCK_O=4, BLOCK_I=block,
                PROLOGUE=prologue,
                OFFSET=False, BIAS=True, RESIDUAL=True, num_warps=4,
            )  # fmt: skip
        yield "skinny", skinny.skinny_kernel, dict(
            dict.fromkeys(("x", "w", "bias", "residual", "y"), "*bf16"), M="i32", O="i32",
            **{f"stride_{name}": "i32" for name in "xwry"}, I=1024, BLOCK_O=16, BLOCK_I=256, BIAS=False, RESIDUAL=False,
            UPCAST=False, STAGES=4, num_warps=4,
        )  # fmt: skip

    return of


HOT = ("split_kernel d128", "split_kernel int8", "split_kernel d96 fp8", "rotate 0", "norm True", "gated False")
"""May not spill on the targets in SETTLED; the others take default settings, which must compile and fit."""
SETTLED = ("sm90", "gfx942")


@pytest.mark.prove
@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_compiles(target: str, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, __file__, target], env=env, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(lines) >= 30
    hot = HOT if target in SETTLED else ()
    wrong = [line for line in lines if line["error"] or (line["name"] in hot and line["spills"])]
    assert not wrong, wrong


def main(target: str) -> None:
    sys.path.insert(0, str(HERE))
    from offline import SHARED_LIMIT, compile_for

    for name, kernel, args in launches()(target):
        error, report = "", None
        try:
            report = compile_for(target, kernel, args)
            if report.shared > SHARED_LIMIT.get(target, 64) * 1024:
                error = f"{report.shared} bytes of shared memory"
        except Exception as failure:
            error = f"{type(failure).__name__}: {str(failure)[:300]}"
        line = dict(name=name, error=error)
        if report is not None:
            line |= dict(registers=report.registers, spills=report.spills, shared=report.shared)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
