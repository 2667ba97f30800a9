"""The shapes that are timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["shapes"]


def shapes(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Decode, extend and prefill over contexts, block sizes and GQA ratios."""
    contexts = (128, 1024) if quick else (128, 1024, 8192, 32768, 131072)
    for context in contexts:
        for H, K in ((8, 8), (8, 2), (8, 1)) if not quick else ((8, 2),):
            if context > 8192 and K == 8:
                continue
            yield _shape(f"decode {context} h{H}k{K}", [[1, context]] * (4 if context <= 8192 else 1), H, K)
    for block in (16, 64) if not quick else ():
        yield {**_shape(f"decode 4096 block {block}", [[1, 4096]] * 4, 8, 2), "block": block}
    for q, context in ((16, 1024), (64, 4096)) if not quick else ((16, 512),):
        yield _shape(f"extend {q} of {context}", [[q, context]], 8, 2)
    for length in (128, 1024) if not quick else (128,):
        yield _shape(f"prefill {length}", [[length, length]], 8, 2)


def _shape(name: str, rows: list[list[int]], H: int, K: int) -> dict[str, Any]:
    return {"name": name, "rows": rows, "H": H, "K": K, "D": 128, "lse": False, "tail": "nan", "spare": 2}
