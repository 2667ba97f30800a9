"""L1 cache writes: slots, scales, layouts, strides; and rows that only the kernel's write has filled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.make import BATCHES, attention_case, slug

__all__ = ["collect"]

_PATTERNS = ("scattered", "run", "reversed", "last", "scratch", "none")


def collect() -> Iterator[Case]:
    rows = [[1, 20], [3, 17]]
    params: dict[str, Any]
    for pattern in _PATTERNS:
        for block in (0, 1, 8, 16, 32, 64, 128):
            for dtype in ("own", "float32", "bfloat16", "float16"):
                if block and dtype not in ("own", "bfloat16"):
                    continue
                params = {"rows": rows, "block": block, "dtype": dtype, "slots": pattern, "H": 8, "K": 2, "spare": 4}
                plain = block == 0 and dtype == "own"
                yield attention_case(
                    "write/slots", f"{pattern}-{slug(params)}", params, kind="write",
                    mandatory=plain, profile="smoke" if plain else "core",
                )  # fmt: skip
    for layout in ("nhd", "hnd", "nz16", "x_packed"):
        for kv in ("", "int8", "float8_e4m3fn"):
            for D in (64, 80, 128):
                for pattern in ("scattered", "run"):
                    params = {
                        "rows": rows, "layout": layout, "kv": kv, "D": D, "slots": pattern, "block": 16,
                        "k_scale": 0.03125 if kv else 1.0, "v_scale": 0.0625 if kv else 1.0, "packed": D == 80,
                    }  # fmt: skip
                    yield attention_case("write/layout", f"{pattern}-{slug(params)}", params, kind="write")
    for stride in ("gap", "interleaved", "layers", "heads", "padded"):
        for pattern in ("scattered", "last", "scratch"):
            params = {"rows": rows, "layout": "nhd", "stride": stride, "slots": pattern, "block": 16}
            yield attention_case("write/stride", f"{pattern}-{slug(params)}", params, kind="write")
    for kv in ("int8", "float8_e4m3fn", "float8_e5m2"):
        for spread in (1.0, 100.0):  # the second saturates
            for tensor in (False, True):
                params = {
                    "rows": rows, "kv": kv, "k_scale": 0.05, "v_scale": 0.11, "spread": spread, "scale_tensor": tensor,
                    "slots": "scattered",
                }  # fmt: skip
                yield attention_case("write/scale", f"x{spread:g}-{slug(params)}", params, kind="write")
    for K, H in ((1, 4), (3, 6), (5, 5), (8, 8)):
        for D, Dv in ((64, 64), (40, 40), (192, 128), (64, 32)):
            params = {"rows": rows, "K": K, "H": H, "D": D, "Dv": Dv, "slots": "run", "tokens": 13, "packed": True}
            yield attention_case("write/heads", slug(params), params, kind="write")
    for D, Dv in ((576, 512), (80, 64)):
        full = {"rows": rows, "K": 1, "H": 2, "latent": True, "layout": "nhd", "block": 16, "D": D, "Dv": Dv}
        yield attention_case("write/latent", slug(full), {**full, "slots": "scattered"}, kind="write")
    for dtype in ("float32", "bfloat16", "float16"):  # a cache in the model's dtype has no scale
        params = {"rows": rows, "dtype": dtype, "k_scale": 0.5, "v_scale": 4.0, "slots": "scattered"}
        yield attention_case("write/unscaled", slug(params), params, kind="write")
    yield from _roundtrips()


def _roundtrips() -> Iterator[Case]:
    params: dict[str, Any]
    for pieces in ([1], [3, 1, 8], [16], [7, 9], [64]):
        for batch in ("decode", "extend", "mixed"):
            for block in (0, 8, 16, 64):
                params = {"rows": BATCHES[batch], "block": block, "pieces": pieces, "H": 4, "K": 1}
                name = f"{'+'.join(map(str, pieces))}-{batch}-{slug(params)}"
                yield attention_case(
                    "write/then-read", name, params, kind="roundtrip", mandatory=block == 0,
                    profile="smoke" if block == 0 and batch == "mixed" else "core",
                )  # fmt: skip
    for kv in ("int8", "float8_e4m3fn"):
        for pieces in ([1], [3, 1, 8]):
            params = {"rows": BATCHES["mixed"], "kv": kv, "k_scale": 0.03125, "v_scale": 0.0625, "pieces": pieces}
            yield attention_case("write/then-read", f"{len(pieces)}-{slug(params)}", params, kind="roundtrip")
    for layout in ("nhd", "hnd", "nz16", "x_packed"):
        for window in (None, 21):
            params = {"rows": BATCHES["mixed"], "layout": layout, "block": 16, "window": window, "pieces": [5, 2]}
            yield attention_case("write/then-read", f"5+2-{slug(params)}", params, kind="roundtrip")
