"""report.json, schema v1: all that a run found, for machines."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dougong_compat import SUITE_VERSION, __version__
from dougong_compat.case import LEVELS, Case
from dougong_compat.honesty import FLOORS, Verdict, mustpass_hash
from dougong_compat.manifest import Manifest
from dougong_compat.outcome import Outcome, Result

__all__ = ["SCHEMA", "build", "load", "reproduction", "schema"]

SCHEMA = 1


def schema() -> dict[str, Any]:
    """The published JSON Schema of report.json."""
    text = (resources.files("dougong_compat") / "report" / "schema-v1.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def reproduction(backend: str, case_id: str, seed: int, options: str = "") -> str:
    """The one line that runs a case again. ``options``: what the run was given besides (``Session.options``)."""
    return f"dougong compat repro --backend {backend}{options} --seed {seed} '{case_id}'"


def build(
    *,
    profile: str,
    facts: Mapping[str, Any],
    manifest: Manifest,
    cases: Sequence[Case],
    results: Sequence[Result],
    verdict: Verdict,
    seconds: float,
    restarts: int = 0,
    performance: Sequence[Mapping[str, Any]] = (),
    jobs: int = 1,
    not_run: Sequence[str] = (),
    parts: Sequence[Mapping[str, Any]] = (),
    options: str = "",
    fuzzing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of a run. ``parts``: the runs it is put together from, where one went on with another. ``options``:
    what a line that runs a case again needs. ``fuzzing``: what was searched, and whether anything was found."""
    totals = Counter(result.outcome for result in results)
    floors = FLOORS[profile]
    levels = {}
    suite = {case.id for case in cases}
    for level in LEVELS:
        there = [result for result in results if result.level == level and result.case_id in suite]
        margins = [result.margin for result in there if result.margin is not None and result.outcome is Outcome.PASS]
        levels[level] = {
            "required": sum(1 for case in cases if case.level == level),
            "floor": floors[level],
            "executed": sum(1 for result in there if result.outcome.executed),
            "passed": sum(1 for result in there if result.outcome is Outcome.PASS),
            "worst_margin": round(max(margins), 6) if margins else None,
        }
    rows = []
    for result in results:
        row = result.to_json()
        if result.outcome.bad or result.outcome is Outcome.WAIVED:
            usual = reproduction(str(facts["backend"]), result.case_id, result.seed, options)
            row["reproduce"] = result.reproduce or usual
        rows.append(row)
    report = {
        "schema": SCHEMA,
        "verdict": verdict.word,
        "reasons": verdict.reasons,
        "totals": {outcome.value.lower(): totals.get(outcome, 0) for outcome in Outcome} | {"cases": len(results)},
        "backend": facts["backend"],
        "profile": profile,
        "suite": {
            "version": __version__,
            "seed_version": SUITE_VERSION,
            "cases_sha256": mustpass_hash(case.id for case in cases),
        },
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "jobs": jobs,
        "worker_restarts": restarts,
        "manifest": manifest.to_json(),
        "environment": dict(facts),
        "levels": levels,
        "cases": rows,
        "not_run": list(not_run),
        "performance": [dict(row) for row in performance],
    }
    if parts:
        report["parts"] = [dict(part) for part in parts]
    if fuzzing:
        report["fuzzing"] = dict(fuzzing)
    return report


def load(path: str | Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        ValueError: it is no report of a schema that this suite knows.
    """
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "cases" not in data:
        raise ValueError(f"{path} is not a conformance report of schema {SCHEMA}")
    return data
