"""Does a report hold together? For readers who did not make it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dougong_compat.honesty import FLOORS, mustpass_hash, mustpass_ids
from dougong_compat.outcome import Outcome
from dougong_compat.report.build import schema
from dougong_compat.report.schema_check import violations

__all__ = ["faults"]


def faults(report: Any) -> list[str]:
    """Every contradiction found; empty if none. A sound report may still be NOT conformant."""
    found = violations(report, schema())
    if found:
        return found[:20]
    cases = report["cases"]
    ids = [case["id"] for case in cases]
    if len(set(ids)) != len(ids):
        found.append("a case has more than one outcome")
    counts = Counter(case["outcome"] for case in cases)
    for outcome in Outcome:
        if report["totals"][outcome.value.lower()] != counts.get(outcome.value, 0):
            found.append(f"totals.{outcome.value.lower()} does not agree with the cases")
    if report["totals"]["cases"] != len(cases):
        found.append("totals.cases does not agree with the cases")
    required = set(mustpass_ids(report["profile"]))
    if report["suite"]["cases_sha256"] != mustpass_hash(required):
        found.append("it was made with another set of cases than this suite's")
    if report["verdict"] == "CONFORMANT":
        found += _conformant(report, set(ids), required)
    return found


def _conformant(report: dict[str, Any], ids: set[str], required: set[str]) -> list[str]:
    found = []
    unknown = {name for name in ids - required if name.split("/")[1:2] != ["plugin"]}  # a plugin's own may be there too
    if required - ids or unknown:
        found.append(f"CONFORMANT with {len(required - ids)} required cases missing and {len(unknown)} unknown")
    bad = [case["id"] for case in report["cases"] if Outcome(case["outcome"]).bad]
    if bad:
        found.append(f"CONFORMANT with {len(bad)} failed cases, e.g. {bad[0]}")
    for level, floor in FLOORS[report["profile"]].items():
        executed = sum(
            1
            for case in report["cases"]
            if case["level"] == level and case["id"] in required and case["outcome"] != "UNSUPPORTED"
        )
        if executed < floor:
            found.append(f"CONFORMANT with {executed} cases executed in {level}, the floor is {floor}")
    return found
