"""L1 functional ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case

__all__ = ["collect"]

_DTYPES = ("own", "float32", "bfloat16", "float16")


def _case(name: str, params: dict[str, Any], *needs: str, smoke: bool = False) -> Case:
    op, dtype = params["op"], params["dtype"]
    wanted = [f"op:{op}", *needs] + ([f"dtype:{dtype}"] if dtype != "own" else [])
    return Case(
        id=f"L1/op/{op}/{name}-{dtype}", level="L1", kind="op", params=params, needs=tuple(wanted),
        profile="smoke" if smoke else "core",
    )  # fmt: skip


def collect() -> Iterator[Case]:
    for dtype in _DTYPES:
        for T in (0, 1, 3, 17):
            for E in (32, 80, 576, 1024):
                for op in ("rms_norm", "add_rms_norm"):
                    for offset in (0.0, 1.0):
                        params = {"op": op, "T": T, "E": E, "dtype": dtype, "offset": offset}
                        yield _case(f"t{T}-e{E}-o{offset:g}", params, smoke=dtype == "own" and T == 3 and E == 80)
                for op in ("silu_mul", "gelu_tanh_mul"):
                    params = {"op": op, "T": T, "E": E, "dtype": dtype}
                    yield _case(f"t{T}-e{E}", params, smoke=dtype == "own" and T == 3 and E == 80)
        for spread in (1e-3, 30.0):
            for op in ("rms_norm", "add_rms_norm", "silu_mul", "gelu_tanh_mul"):
                yield _case(f"spread{spread:g}", {"op": op, "T": 5, "E": 256, "dtype": dtype, "spread": spread})
        yield from _ropes(dtype)
        yield from _fused(dtype)
        yield from _merges(dtype)
    yield from _samples()


def _ropes(dtype: str) -> Iterator[Case]:
    for D, R in ((64, 64), (64, 32), (80, 20), (128, 128), (96, 64)):
        for interleaved in (False, True):
            for T, positions in ((0, 8), (1, 1), (7, 300), (5, 131072)):
                if positions > 1000 and (D != 64 or R != 64):
                    continue
                params = {
                    "op": "rope",
                    "T": T,
                    "H": 3,
                    "D": D,
                    "R": R,
                    "positions": positions,
                    "interleaved": interleaved,
                    "dtype": dtype,
                }
                yield _case(
                    f"d{D}-r{R}-p{positions}-t{T}{'-pairs' if interleaved else ''}", params, smoke=T == 7 and D == 80
                )


def _fused(dtype: str) -> Iterator[Case]:
    for H, K, D, Dv in ((4, 4, 64, 64), (6, 2, 64, 64), (8, 1, 128, 128), (5, 5, 40, 40), (4, 2, 96, 64)):
        for norms, R, offset in ((True, D, 0.0), (False, D, 0.0), (True, D // 2, 1.0), (False, 0, 0.0)):
            for T in (1, 9):
                params = {
                    "op": "qk_norm_rope_write",
                    "T": T,
                    "H": H,
                    "K": K,
                    "D": D,
                    "Dv": Dv,
                    "R": R,
                    "norms": norms,
                    "offset": offset,
                    "interleaved": H == 6,
                    "blocks": 4,
                    "block": 16,
                    "layout": "nhd" if H != 8 else "hnd",
                    "dtype": dtype,
                    "no_cache": T == 1 and not norms,
                }
                name = f"h{H}k{K}-d{D}-{Dv}-r{R}-t{T}{'-norm' if norms else ''}"
                yield _case(name, params, f"layout:{params['layout']}", "block:16", smoke=H == 6 and T == 9)


def _merges(dtype: str) -> Iterator[Case]:
    for T in (0, 1, 6):
        for H, D in ((1, 32), (3, 64), (7, 128), (4, 512)):
            for empty in ("none", "mixed"):
                params = {"op": "merge_lse", "T": T, "H": H, "D": D, "empty": empty, "dtype": dtype}
                yield _case(f"t{T}-h{H}-d{D}-{empty}", params, smoke=T == 6 and H == 3)
    for spread in (0.0, 60.0):
        yield _case(f"spread{spread:g}", {"op": "merge_lse", "T": 6, "H": 3, "D": 64, "spread": spread, "dtype": dtype})


def _samples() -> Iterator[Case]:
    for mode in ("greedy", "random", "mixed"):
        for V in (2, 33, 1000, 4099):
            for filters in ({}, {"top_k": 1}, {"top_p": 1}, {"min_p": 1}, {"top_k": 1, "top_p": 1, "min_p": 1}):
                for extra in ({}, {"masked": 1}, {"ties": 1}):
                    if extra.get("ties") and (filters or mode != "greedy"):
                        continue
                    params = {"R": 5, "V": V, "mode": mode, **filters, **extra, "alone": V == 33}
                    name = "-".join([mode, f"v{V}", *filters, *extra])
                    yield Case(
                        id=f"L1/op/sample/{name}", level="L1", kind="sample", params=params, needs=("op:sample",),
                        profile="smoke" if V == 33 else "core",
                    )  # fmt: skip
