"""Does a report hold together? For readers who did not make it. Whether it was made up only another run can tell."""

from __future__ import annotations

import datetime
import fnmatch
from collections import Counter
from typing import Any

from dougong_compat.case import seed_of
from dougong_compat.cases import collect_profile
from dougong_compat.honesty import FLOORS, mustpass_hash, mustpass_ids
from dougong_compat.manifest import Manifest, Waiver
from dougong_compat.outcome import Outcome
from dougong_compat.report.build import schema
from dougong_compat.report.schema_check import violations

__all__ = ["faults"]

#: Groups of cases that may be in a report and are not the suite's: a plugin's own, and what a search found.
_BESIDE = ("plugin", "fuzz")


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
    found += _levels(report, required)
    found += _rows(report, required)
    if report["verdict"] == "CONFORMANT":
        found += _conformant(report, set(ids), required)
    return found


def _levels(report: dict[str, Any], required: set[str]) -> list[str]:
    """The table of levels against the cases."""
    found = []
    for name, level in report["levels"].items():
        rows = [row for row in report["cases"] if row["level"] == name and row["id"] in required]
        outcomes = [Outcome(row["outcome"]) for row in rows]
        wanted = {
            "required": sum(1 for case in required if case.startswith(f"{name}/")),
            "executed": sum(outcome.executed for outcome in outcomes),
            "passed": outcomes.count(Outcome.PASS),
        }
        found += [
            f"levels.{name}.{key} is {level[key]}, the cases say {value}"
            for key, value in wanted.items()
            if level[key] != value
        ]
    return found


def _rows(report: dict[str, Any], required: set[str]) -> list[str]:
    """Seeds that are not the cases', margins above 1 that pass, outcomes that the rules do not allow."""
    waivers = _waivers(report)
    known = {case.id: case for case in collect_profile("core")}  # of the full profile's others the id gives the seed
    wrong: dict[str, list[str]] = {}
    for row in report["cases"]:
        name, case = row["id"], known.get(row["id"])
        if row["outcome"] == "PASS" and (row.get("margin") or 0.0) > 1:
            wrong.setdefault("passed outside the bound", []).append(name)
        if row["outcome"] == "WAIVED" and not any(fnmatch.fnmatchcase(name, one.case) for one in waivers):
            wrong.setdefault("waived without a waiver", []).append(name)
        if name not in required:
            continue
        if row["seed"] != (case.actual_seed if case is not None else seed_of(name)):
            wrong.setdefault("run with another seed than the case's", []).append(name)
        skipped = row.get("message", "").startswith("skipped by the suite")
        if case is not None and case.mandatory and row["outcome"] == "UNSUPPORTED" and not skipped:
            wrong.setdefault("mandatory, and refused without failing", []).append(name)
    return [f"{len(names)} cases {what}, e.g. {names[0]}" for what, names in wrong.items()]


def _conformant(report: dict[str, Any], ids: set[str], required: set[str]) -> list[str]:
    found = []
    unknown = {name for name in ids - required if name.split("/")[1] not in _BESIDE}
    if required - ids or unknown:
        found.append(f"CONFORMANT with {len(required - ids)} required cases missing and {len(unknown)} unknown")
    bad = [case["id"] for case in report["cases"] if Outcome(case["outcome"]).bad]
    if bad:
        found.append(f"CONFORMANT with {len(bad)} failed cases, e.g. {bad[0]}")
    for level, floor in FLOORS[report["profile"]].items():
        executed = report["levels"][level]["executed"]
        if executed < floor:
            found.append(f"CONFORMANT with {executed} cases executed in {level}, the floor is {floor}")
    if report["profile"] == "certified" and report["manifest"]["tolerance"] != "strict":
        found.append("CONFORMANT and certified with a relaxed tolerance")
    if report["profile"] in ("full", "certified") and "fuzzing" not in report:
        found.append(f"CONFORMANT in {report['profile']} without the search for failing batches")
    when = datetime.date.fromisoformat(report["when"][:10])
    return found + Manifest("", {}, frozenset({"engine"}), waivers=_waivers(report)).problems(when)


def _waivers(report: dict[str, Any]) -> tuple[Waiver, ...]:
    return tuple(
        Waiver(one["case"], one["issue"], datetime.date.fromisoformat(one["expires"]))
        for one in report["manifest"]["waivers"]
    )
