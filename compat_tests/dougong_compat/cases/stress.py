"""L4: determinism, batch invariance, graph replay, plans in flight, leaks. Only where declared, or eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.make import BATCHES, FEATURES, attention_case, slug, variants_case

__all__ = ["collect"]


def _add(case: Case, *needs: str) -> Case:
    return Case(**{**case.__dict__, "needs": (*case.needs, *needs)})


def collect() -> Iterator[Case]:
    yield from _reruns()
    yield from _invariance()
    yield from _graphs()


def _reruns() -> Iterator[Case]:
    for check, needs in (
        ("rerun", ("deterministic",)), ("replan", ("deterministic",)), ("two_plans", ("deterministic",)),
        ("side_stream", ("deterministic",)), ("leak", ()),
    ):  # fmt: skip
        for batch in ("decode", "mixed", "long", "longextend", "zeros"):
            for feature in ("plain", "sinks", "lse") if check in ("rerun", "replan") else ("plain",):
                params: dict[str, Any] = {**FEATURES[feature], "rows": BATCHES[batch], "check": check, "H": 8, "K": 2}
                yield _add(
                    attention_case(
                        f"stress/{check.replace('_', '-')}",
                        f"{batch}-{slug(params)}",
                        params,
                        level="L4",
                        kind="stress",
                        profile="full",
                    ),
                    *needs,
                )


def _invariance() -> Iterator[Case]:
    for batch in ("decode", "extend", "mixed", "long", "longextend"):
        for H, K in ((4, 1), (8, 8), (6, 2)):
            for feature in ("plain", "softcap", "sinks"):
                rows = [row for row in BATCHES[batch] if row[0]]
                base = {**FEATURES[feature], "rows": rows, "H": H, "K": K, "batch_invariant": True}
                keeps: list[dict[str, Any]] = [{"keep": [row], "name": f"row {row} alone"} for row in range(len(rows))]
                yield variants_case(
                    "invariance",
                    f"{batch}-{slug(base)}",
                    base,
                    keeps,
                    level="L4",
                    needs=("batch_invariant",),
                    profile="full",
                )


def _graphs() -> Iterator[Case]:
    rows = {"decode": [[1, 20], [1, 7], [1, 33]], "draft": [[3, 20], [3, 9]], "long": [[1, 400], [1, 30]]}
    replays: dict[str, dict[str, list[dict[str, Any]]]] = {
        "decode": {
            "next-token": [{"rows": [[1, 20 + i], [1, 7 + i], [1, 33 + i]]} for i in range(1, 4)],
            "tables": [{"page_seed": 1}, {"page_seed": 2}],
            "padding": [{"rows": [[1, 21], [1, 0], [1, 0]]}, {"rows": [[1, 5], [1, 6], [1, 7]]}],
        },
        "draft": {"next": [{"rows": [[3, 23], [3, 12]]}, {"rows": [[3, 3], [3, 90]], "page_seed": 1}]},
        "long": {"shrink": [{"rows": [[1, 3], [1, 1]]}], "grow": [{"rows": [[1, 900], [1, 600]]}]},
    }
    for batch, names in replays.items():
        for name, turns in names.items():
            for feature in ("plain", "lse", "sinks", "softcap"):
                for window in (None, 16):
                    for eager in (False, True):
                        params = {
                            **FEATURES[feature],
                            "rows": rows[batch],
                            "replays": turns,
                            "window": window,
                            "eager": eager,
                            "write": batch == "decode",
                            "H": 4,
                            "K": 1,
                        }
                        case = attention_case(
                            "replay" if not eager else "plan-reuse", f"{batch}-{name}-{slug(params)}", params,
                            level="L4" if not eager else "L2", kind="graph", profile="full" if not eager else "core",
                        )  # fmt: skip
                        yield case if eager else _add(case, "graphs")
