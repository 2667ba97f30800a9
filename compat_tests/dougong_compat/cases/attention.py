"""L1 attention: covering arrays over all axes, boundary lists, random ragged batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.make import BATCHES, FEATURES, attention_case, slug
from dougong_compat.covering import cover

__all__ = ["boundaries", "collect", "grid", "mandatory", "ragged"]

BLOCKS = (1, 8, 16, 32, 64, 128, 544)
DIMS = (32, 40, 64, 72, 80, 96, 112, 128, 192, 256)
#: (H, K): ratios 1, 3, 5, 6, 7, 8 and 12, and 4.
HEADS = ((2, 2), (3, 1), (5, 1), (6, 1), (14, 2), (8, 1), (12, 1), (8, 2))
STRIDES = ("plain", "gap", "interleaved", "layers", "heads", "padded")

#: How many parts a kernel splits a row into is its own affair; rows of a few and of hundreds of keys, alone and in
#: company, are what makes it choose. So ``batch`` is the axis of splits too.
AXES: dict[str, tuple[Any, ...]] = {
    "batch": tuple(BATCHES),
    "layout": ("own", "nhd", "hnd", "nz16", "x_packed"),
    "block": (0, *BLOCKS),
    "D": DIMS,
    "heads": HEADS,
    "feature": tuple(FEATURES),
    "window": (None, 1, 7, 32, 200),
    "dtype": ("own", "float32", "bfloat16", "float16"),
    "stride": STRIDES,
    "q_pack": (False, True),
    "host_len": (True, False),
    "lse": (False, True),
    "tail": ("nan", "loud"),
    "table_tail": ("huge", "negative"),
    "dead": ("zero", "keep"),
    "slack": (0, 37),
}
#: Three-way in full over what addressing and tiling depend on.
DEEP = ("batch", "layout", "block", "D", "heads", "window", "dtype")


def allowed(row: dict[str, Any]) -> bool:
    """Whether a (partial) combination is one that some backend could be asked for."""
    layout, block, stride = row.get("layout"), row.get("block"), row.get("stride", "plain")
    if layout == "x_packed" and block is not None and block not in (16, 32):
        return False
    if layout == "nz16" and block is not None and (block % 16 or not block):
        return False
    if "D" in row and layout in ("nz16", "x_packed") and row["D"] % 16:
        return False
    # strides are for plainly named axes; a backend's own layout may be any
    if layout is not None and stride in ("heads", "padded") and layout != "nhd":
        return False
    if layout is not None and stride != "plain" and layout == "own":
        return False
    if block == 544 and row.get("batch") in ("long", "longextend"):
        return False
    return not (row.get("feature") in ("int8", "fp8") and stride == "padded")


def _case(group: str, row: dict[str, Any], profile: str, name: str = "") -> Case:
    row = dict(row)
    batch = row.pop("batch")
    feature = row.pop("feature", "plain")
    row["H"], row["K"] = row.pop("heads")
    params = {**row, **{k: v for k, v in FEATURES[feature].items() if k != "lse"}, "rows": BATCHES[batch]}
    params["lse"] = bool(row.get("lse")) or bool(FEATURES[feature].get("lse"))
    return attention_case(group, f"{name}{batch}-{slug(params)}", params, profile=profile)


def grid(deep: bool = True) -> Iterator[Case]:
    """Pairwise over all axes (three times, each with other partners), three-way over those of addressing."""
    seen: set[str] = set()
    for case in [*_pairs(), *(_triples() if deep else ())]:
        if case.id not in seen:
            seen.add(case.id)
            yield case


@lru_cache(maxsize=1)
def _pairs() -> tuple[Case, ...]:
    found = []
    for turn in range(3):
        for row in cover(AXES, 2, allowed, seed=turn, tries=3):
            found.append(_case("attention/pairs", row, "core"))
    return tuple(found)


@lru_cache(maxsize=1)
def _triples() -> tuple[Case, ...]:
    deep = {name: AXES[name] for name in DEEP}
    rng = random.Random(3)
    found = []
    for row in cover(deep, 3, allowed, seed=1, tries=4):
        rest: dict[str, Any] = {name: rng.choice(AXES[name]) for name in AXES if name not in DEEP}
        full = {**row, **rest}
        if not allowed(full):
            full["stride"] = "plain"
        if not allowed(full):
            full["feature"] = "plain"
        found.append(_case("attention/triples", full, "full"))
    return tuple(found)


def mandatory() -> Iterator[Case]:
    """What no backend can declare away: its own dtype, layout and block size."""
    for batch in ("decode", "single", "extend", "prefill", "mixed", "zeros", "long", "longextend"):
        for D in (64, 128):
            for H, K in ((2, 2), (4, 1), (8, 1)):
                params = {
                    "D": D,
                    "H": H,
                    "K": K,
                    "rows": BATCHES[batch],
                    "table_tail": "negative" if D == 64 else "huge",
                }
                yield attention_case(
                    "attention/mandatory", f"{batch}-h{H}k{K}-d{D}", params, mandatory=True, profile="smoke"
                )
    for tail in ("nan", "loud"):
        for table_tail in ("huge", "negative", "zero"):
            for batch in ("decode", "mixed", "zeros"):
                params = {"rows": BATCHES[batch], "tail": tail, "table_tail": table_tail, "H": 4, "K": 1}
                yield attention_case(
                    "attention/mandatory",
                    f"poison-{batch}-{tail}-{table_tail}",
                    params,
                    mandatory=True,
                    profile="smoke",
                )
    for batch in ("decode", "extend", "prefill", "mixed"):
        params = {"rows": BATCHES[batch], "H": 4, "K": 1, "q_pack": True, "write": True}
        yield attention_case("attention/mandatory", f"write-{batch}", params, mandatory=True, profile="smoke")


def boundaries() -> Iterator[Case]:
    """Lengths, windows, contexts, head geometries and layouts at their edges."""
    yield from _lengths()
    yield from _windows()
    yield from _contexts()
    yield from _geometry()
    yield from _features()
    yield from _layouts()


def _lengths() -> Iterator[Case]:
    lengths = [f"{k}b{d:+d}" if d else f"{k}b" for k in (1, 2, 3, 4) for d in (-1, 0, 1)] + [1, 2]
    for block in (0, 1, 8, 16, 32, 64, 128):
        for H, K in ((4, 4), (8, 1), (6, 2)):
            for length in lengths:
                params = {"rows": [[1, length]], "block": block, "H": H, "K": K, "D": 64}
                smoke = block == 0 and H == 8
                yield attention_case(
                    "attention/length", f"decode-{length}-{slug(params)}", params, profile="smoke" if smoke else "core"
                )
    for length in ("b-1", "b", "b+1"):
        params = {"rows": [[1, length]], "block": 544, "H": 8, "K": 1, "D": 64}
        yield attention_case("attention/length", f"decode-{length}-{slug(params)}", params)


def _windows() -> Iterator[Case]:
    for block in (0, 8, 16):
        size = block or 16
        for window in (1, 2, size - 1, size, size + 1, 2 * size):
            for off in (-1, 0, 1, size + 1):
                for q in (1, 5):
                    kv = window + off + q - 1
                    if kv < 1:
                        continue
                    params = {"rows": [[q, kv], [q, kv + size]], "block": block, "window": window, "lse": q == 1}
                    yield attention_case("attention/window", f"q{q}-kv{kv}-{slug(params)}", params)


def _contexts() -> Iterator[Case]:
    for dtype in ("own", "float32", "float16"):
        for context in (0, 1, "b-1", "b", "b+1"):
            for q in (2, 3, 8, "b", "b+1"):
                kv = context if q == 0 else _add(context, q)
                params = {"rows": [[q, kv], [2, 3]], "block": 16, "dtype": dtype, "H": 6, "K": 2}
                yield attention_case("attention/context", f"c{context}-q{q}-{slug(params)}", params)


def _add(a: int | str, b: int | str) -> int | str:
    """The sum of two lengths given in tokens or blocks."""

    def parts(x: int | str) -> tuple[int, int]:
        if isinstance(x, int):
            return 0, x
        head, _, tail = x.partition("b")
        return int(head or 1), int(tail or 0)

    blocks, rest = (i + j for i, j in zip(parts(a), parts(b), strict=True))
    return f"{blocks}b{rest:+d}" if blocks else rest


def _geometry() -> Iterator[Case]:
    for H, K in (*HEADS, (9, 3), (16, 1), (4, 4)):
        for D in DIMS:
            for batch in ("decode", "extend"):
                params = {"rows": BATCHES[batch], "H": H, "K": K, "D": D, "lse": batch == "extend"}
                yield attention_case("attention/heads", f"{batch}-{slug(params)}", params)
    for D, Dv in ((64, 32), (96, 64), (128, 64), (192, 128), (64, 96)):
        for batch in ("decode", "extend", "prefill", "mixed"):
            params = {"rows": BATCHES[batch], "D": D, "Dv": Dv}
            yield attention_case("attention/dv", f"{batch}-{slug(params)}", params)
    for D, Dv, H in ((576, 512, 4), (80, 64, 8), (192, 128, 3)):
        for batch in ("decode", "extend", "zeros", "long"):
            params = {"rows": BATCHES[batch], "D": D, "Dv": Dv, "H": H, "K": 1, "latent": True, "layout": "nhd"}
            yield attention_case("attention/latent", f"{batch}-{slug(params)}", params)


def _features() -> Iterator[Case]:
    for name, feature in FEATURES.items():
        for batch in BATCHES:
            for dtype in ("own", "float32", "bfloat16", "float16"):
                params = {**feature, "rows": BATCHES[batch], "dtype": dtype, "H": 6, "K": 2}
                if name == "lse" and batch == "long":
                    params["block"] = 16
                smoke = dtype == "own" and batch in ("decode", "mixed", "long")
                yield attention_case(
                    "attention/feature", f"{name}-{batch}-{slug(params)}", params, profile="smoke" if smoke else "core"
                )
    for batch in ("prefill", "extend", "zeros", "past"):
        for name in ("plain", "softcap", "alibi", "sinks", "noncausal", "lse"):
            params = {**FEATURES[name], "rows": BATCHES[batch], "ragged": True}
            if batch != "prefill":
                params["causal"] = False
            yield attention_case("attention/ragged-kv", f"{name}-{batch}-{slug(params)}", params)


def _layouts() -> Iterator[Case]:
    for layout in ("nhd", "hnd", "nz16", "x_packed"):
        for block in BLOCKS:
            for D in (32, 64, 80, 128):
                for batch in ("decode", "extend"):
                    row = {"layout": layout, "block": block, "D": D, "batch": batch}
                    if allowed(row) and not (block == 544 and D > 64):
                        params = {"layout": layout, "block": block, "D": D, "rows": BATCHES[batch]}
                        yield attention_case("attention/layout", f"{batch}-{slug(params)}", params)
    for stride in STRIDES[1:]:
        for layout in ("nhd", "hnd") if stride not in ("heads", "padded") else ("nhd",):
            for dtype in ("own", "float32", "bfloat16"):
                for batch in ("decode", "mixed", "long"):
                    params = {"stride": stride, "layout": layout, "dtype": dtype, "rows": BATCHES[batch]}
                    yield attention_case("attention/stride", f"{batch}-{slug(params)}", params)
    for kv in ("int8", "float8_e4m3fn", "float8_e5m2"):
        for scales in ((1.0, 1.0), (0.05, 0.05), (0.03125, 4.0)):
            for batch in ("decode", "extend", "mixed", "long"):
                for tensor in (False, True):
                    numbers: dict[str, Any] = {
                        "kv": kv, "k_scale": scales[0], "v_scale": scales[1], "scale_tensor": tensor,
                        "rows": BATCHES[batch], "write": batch == "extend",
                    }  # fmt: skip
                    yield attention_case("attention/kv-dtype", f"{batch}-{slug(numbers)}", numbers)


def random_rows(rng: random.Random, block: int = 16) -> list[list[int | str]]:
    """A ragged batch: decode rows first, lengths that like block edges, some rows empty."""

    def kv() -> int:
        return max(0, rng.choice((0, 1, 2, 3, 5, 9)) * block + rng.choice((-1, 0, 1, rng.randrange(block))))

    rows: list[list[int | str]] = [[1, max(1, kv())] for _ in range(rng.randrange(5))]
    for _ in range(rng.randrange(4)):
        q = rng.choice((0, 2, 3, 7, 16, 17, rng.randrange(2, 40)))
        rows.append([q, q + rng.choice((0, 1, block - 1, block, kv()))])
    return rows or [[1, 1]]


def ragged(count: int = 300) -> Iterator[Case]:
    """Random ragged batches with random features, from fixed seeds."""
    for index in range(count):
        rng = random.Random(1000 + index)
        H, K = rng.choice(HEADS)
        block = rng.choice((0, 8, 16, 32))
        params: dict[str, Any] = {
            **FEATURES[rng.choice(("plain", "plain", "plain", "softcap", "sinks", "alibi", "lse"))],
            "rows": random_rows(rng, block or 16), "H": H, "K": K, "D": rng.choice((32, 64, 96, 128)), "block": block,
            "window": rng.choice((None, None, 5, 33)), "table_tail": rng.choice(("huge", "negative", "zero")),
            "q_pack": rng.random() < 0.5, "width": rng.randrange(4), "write": rng.random() < 0.3,
        }  # fmt: skip
        smoke = index < 20
        yield attention_case("attention/ragged", f"{index:03d}", params, profile="smoke" if smoke else "core")


def collect(deep: bool = True) -> Iterator[Case]:
    """All of them; without ``deep`` not the three-way array of the full profile, which takes seconds to make."""
    yield from mandatory()
    yield from boundaries()
    yield from ragged()
    yield from grid(deep)
