"""L3: the engine on this backend against a contiguous float64 model, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case

__all__ = ["collect"]


def _case(name: str, smoke: bool = False, **params: Any) -> Case:
    dtype = params.get("dtype", "own")
    needs = ["engine"] + ([f"dtype:{dtype}"] if dtype != "own" else [])
    return Case(
        id=f"L3/engine/{name}", level="L3", kind="engine", params={"dtype": "own", "lse": False, **params},
        needs=tuple(needs), profile="smoke" if smoke else "core",
    )  # fmt: skip


def collect() -> Iterator[Case]:
    for dtype in ("own", "float32"):
        for chunk in (1, 7, 16, 64, 2048):
            for prefix in (True, False):
                for overlap in (True, False):
                    name = f"chunk{chunk}-{'prefix' if prefix else 'cold'}-{'overlap' if overlap else 'step'}-{dtype}"
                    yield _case(
                        f"chunks/{name}", smoke=dtype == "own" and chunk == 7 and overlap, check="greedy", chunk=chunk,
                        prefix=prefix, overlap=overlap, dtype=dtype,
                    )  # fmt: skip
        for blocks in (12, 14, 18, 24):
            for prefix in (True, False):
                for overlap in (True, False):
                    name = f"blocks{blocks}-{'prefix' if prefix else 'cold'}-{'overlap' if overlap else 'step'}-{dtype}"
                    yield _case(
                        f"preempt/{name}", check="preempt", blocks=blocks, prefix=prefix, overlap=overlap, dtype=dtype
                    )
        for chunk in (5, 64):
            for seqs in (1, 2, 3, 8):
                yield _case(f"batch/{seqs}-chunk{chunk}-{dtype}", check="greedy", chunk=chunk, seqs=seqs, dtype=dtype)
            for n in (2, 4):
                yield _case(f"siblings/n{n}-chunk{chunk}-{dtype}", check="siblings", n=n, chunk=chunk, dtype=dtype)
            for after in (1, 2, 5):
                yield _case(
                    f"abort/after{after}-chunk{chunk}-{dtype}", check="abort", after=after, chunk=chunk, dtype=dtype
                )
            for length in (1, 15, 16, 17, 31, 32, 33, 48):
                yield _case(
                    f"length/{length}-chunk{chunk}-{dtype}", check="greedy", chunk=chunk, lengths=[length], dtype=dtype
                )
            for round_ in (2, 3):
                yield _case(
                    f"warm/{round_}-chunk{chunk}-{dtype}", check="warm", rounds=round_, chunk=chunk, dtype=dtype
                )
