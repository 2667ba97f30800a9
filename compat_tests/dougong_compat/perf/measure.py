"""Ceilings first (copy, read, matrix product), then attention; outputs are checked while timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dougong_compat.case import seed_of
from dougong_compat.manifest import find
from dougong_compat.perf.shapes import shapes
from dougong_compat.pool import Target, Worker
from dougong_compat.resolve import Resolver

__all__ = ["measure"]


def measure(
    target: Target,
    *,
    quick: bool = False,
    manifest_path: str | None = None,
    timeout: float = 300.0,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One row per ceiling and shape: name, microseconds, achieved, ceiling, share (of the nearer ceiling).

    ``on_row`` hears (shapes done, shapes in all).

    ``invalid`` marks a row above 100% of its ceiling or with a wrong answer: its number means nothing.
    """
    rows: list[dict[str, Any]] = []
    with Worker(target, timeout=timeout) as worker:
        facts = worker.start()
        resolver = Resolver(facts, find(facts, manifest_path, target.plugins))
        small = quick or facts["device_type"] == "cpu"
        ask = {
            "id": "L5/ceilings",
            "kind": "perf",
            "seed": 1,
            "params": {"what": "ceilings", "small": small, "dtype": resolver.dtype},
        }
        answer = next(iter(worker.ask([ask])))
        if answer.fate != "answered" or "error" in answer.message:
            return [
                {
                    "name": "ceilings",
                    "share": None,
                    "invalid": True,
                    "message": answer.message.get("error", answer.detail),
                }
            ]
        ceilings = answer.message["ceilings"]
        for name in ("copy", "read", "matmul"):
            unit = "GFLOP/s" if name == "matmul" else "GB/s"
            rows.append(
                {
                    "name": f"ceiling: {name}",
                    "share": None,
                    "achieved": f"{ceilings[name] / 1e9:.1f} {unit}",
                    "ceiling": "",
                }
            )
        best = {"bytes": max(ceilings["copy"], ceilings["read"]), "flops": ceilings["matmul"]}
        asked = list(shapes(quick))
        for done, shape in enumerate(asked):
            on_row(done, len(asked))
            params = resolver.params({**shape, "what": "attention", "small": small})
            case = f"L5/{shape['name']}"
            answer = next(iter(worker.ask([{"id": case, "kind": "perf", "seed": seed_of(case), "params": params}])))
            rows.append(_row(shape["name"], answer, best))
    return rows


def _row(name: str, answer: Any, best: dict[str, float]) -> dict[str, Any]:
    message = answer.message
    if answer.fate != "answered" or "error" in message or "refused" in message or "skipped" in message:
        why = message.get("error") or message.get("refused") or message.get("skipped") or answer.detail
        return {"name": name, "share": None, "message": str(why)[:200]}
    seconds = message["seconds_each"]
    by_bytes = message["bytes"] / seconds / best["bytes"]
    by_flops = message["flops"] / seconds / best["flops"]
    share = max(by_bytes, by_flops)
    row = {
        "name": name,
        "microseconds": round(seconds * 1e6, 2),
        "share": round(share, 4),
        "provider": message.get("provider", ""),
        "achieved": f"{message['bytes'] / seconds / 1e9:.1f} GB/s, {message['flops'] / seconds / 1e9:.1f} GFLOP/s",
        "ceiling": "memory" if by_bytes >= by_flops else "arithmetic",
    }
    if share > 1.0 or not message["right"]:
        row["invalid"] = True
        row["message"] = (
            "above its ceiling: the measurement is wrong" if message["right"] else "the timed answer is wrong"
        )
    return row
