"""L2: the block manager's state machine and its hand-written scenes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case

__all__ = ["collect"]

_GROUPS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"block_size": 4, "num_blocks": 24, "num_scratch_blocks": 2}],
    "block1": [{"block_size": 1, "num_blocks": 60}],
    "block16": [{"block_size": 16, "num_blocks": 9}],
    "scarce": [{"block_size": 4, "num_blocks": 13}],
    "window": [{"block_size": 4, "num_blocks": 20, "window": 9}],
    "hybrid": [{"block_size": 4, "num_blocks": 24}, {"block_size": 4, "num_blocks": 20, "window": 7}],
    "sizes": [{"block_size": 8, "num_blocks": 16}, {"block_size": 4, "num_blocks": 24, "window": 11}],
}


def collect() -> Iterator[Case]:
    for name, groups in _GROUPS.items():
        for caching in (True, False):
            for turn in range(12 if caching else 3):
                params = {"check": "random_walk", "groups": groups, "caching": caching, "steps": 120}
                yield _case(f"walk/{name}-{'cached' if caching else 'plain'}-{turn:02d}", params, smoke=turn == 0)
    for block in (1, 4, 16):
        for window in (1, 2, 5, 16, 17):
            yield _case(f"window/n{block}-w{window}", {"check": "window", "block": block, "window": window})
    for check in ("held_until_released", "insert_then_preempt", "copy_on_write", "hybrid_prefix", "resume"):
        yield _case(f"scene/{check.replace('_', '-')}", {"check": check}, smoke=True)


def _case(name: str, params: dict[str, Any], smoke: bool = False) -> Case:
    return Case(
        id=f"L2/manager/{name}", level="L2", kind="manager", params=params, needs=("kv_manager",),
        profile="smoke" if smoke else "core",
    )  # fmt: skip
