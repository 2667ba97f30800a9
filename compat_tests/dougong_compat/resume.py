"""Going on with a run that was cut, or from a smaller profile: results stand of the same suite, backend and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dougong_compat.case import PROFILES
from dougong_compat.outcome import Outcome, Result

__all__ = ["parts_of", "same_run", "stood", "within"]

_FACTS = ("backend", "plugin", "version", "device", "torch")
_JUDGED_BY = ("tolerance", "capabilities", "waivers")


def within(profile: str) -> tuple[str, ...]:
    """The profiles whose cases ``profile`` runs in the same way. ``certified`` runs all of them in its own."""
    return (profile,) if profile == "certified" else PROFILES[: PROFILES.index(profile) + 1]


def same_run(
    report: Mapping[str, Any], facts: Mapping[str, Any], manifest: Mapping[str, Any], profile: str, cases_sha256: str
) -> None:
    """Refuse a report that another run's results cannot be added to.

    ``manifest``: as in a report; ``cases_sha256``: of the report's own profile, as the suite is today.

    Raises:
        ValueError: it is of a profile that is not part of this one, of another suite, backend, device, torch, kernels
            or manifest; says which.
    """
    given, wanted = report["environment"], dict(facts)
    parts = within(profile)
    differ = [] if report["profile"] in parts else [f"profile {report['profile']!r}, not {' or '.join(parts)}"]
    if report["suite"]["cases_sha256"] != cases_sha256:
        differ.append(f"suite {report['suite']['version']} with other cases")
    differ += [
        f"{name} {given.get(name)!r}, not {wanted.get(name)!r}"
        for name in _FACTS
        if given.get(name) != wanted.get(name)
    ]
    if given.get("kernels") != wanted.get("kernels"):
        differ.append("other kernels")
    differ += [f"a manifest with other {name}" for name in _JUDGED_BY if report["manifest"][name] != manifest[name]]
    if differ:
        raise ValueError(f"the report to go on from is of {'; '.join(differ)}: run the profile anew")


def stood(report: Mapping[str, Any]) -> list[Result]:
    """The results in a report, as they were judged then."""
    return [
        Result(
            case_id=row["id"],
            level=row["level"],
            outcome=Outcome(row["outcome"]),
            message=row.get("message", ""),
            margin=row.get("margin"),
            seconds=row["seconds"],
            provider=row.get("provider", ""),
            warnings=list(row.get("warnings", ())),
            seed=row["seed"],
            entry=row.get("entry", 0),
            link=row.get("link", ""),
            reproduce=row.get("reproduce", ""),
        )
        for row in report["cases"]
    ]


def parts_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """When the runs were that a report is put together from, and how long each took."""
    known: list[dict[str, Any]] = list(report.get("parts", ()))
    return known or [{"when": report["when"], "seconds": report["seconds"], "cases": report["totals"]["cases"]}]
