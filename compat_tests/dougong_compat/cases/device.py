"""L0: device and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case

__all__ = ["collect"]


def _case(name: str, check: str, **params: Any) -> Case:
    profile = params.pop("profile", "smoke")
    return Case(
        id=f"L0/device/{name}",
        level="L0",
        kind="device",
        params={"check": check, **params},
        mandatory=True,
        profile=profile,
    )


def collect() -> Iterator[Case]:
    for check in (
        "identity",
        "dtypes",
        "strided_copy",
        "index",
        "streams",
        "event_reuse",
        "memory",
        "cache",
        "seeding",
        "empties",
    ):
        yield _case(check.replace("_", "-"), check)
    for dtype in ("float32", "bfloat16", "float16", "int8", "int32", "int64", "uint8"):
        for count in (0, 1, 3, 255, 4097):
            yield _case(f"copy-{dtype}-{count}", "copy", dtype=dtype, count=count, offset=0)
    for dtype in ("float32", "float16", "uint8"):
        for offset in (1, 3, 7):
            yield _case(f"copy-{dtype}-offset{offset}", "copy", dtype=dtype, count=1001, offset=offset)
    for size in (2**31 + 5, 2**32 + 3):
        yield _case(f"giant-{size}", "giant", bytes=size, profile="core")
    for check in ("copy_after_compute", "compute_after_copy", "pinned_lifetime"):
        yield _case(check.replace("_", "-"), check)
