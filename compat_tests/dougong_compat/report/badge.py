"""badge.json in the form that badge services read."""

from __future__ import annotations

from typing import Any

__all__ = ["badge"]


def badge(report: dict[str, Any]) -> dict[str, Any]:
    """Verdict, profile, how many of the suite's cases passed and, where there are any, waivers and a tolerance that is
    not strict."""
    passed, waived = sum(level["passed"] for level in report["levels"].values()), report["totals"]["waived"]
    colour = {"CONFORMANT": "brightgreen", "NOT": "red", "INVALID": "lightgrey"}[report["verdict"]]
    word = {"CONFORMANT": "conformant", "NOT": "not conformant", "INVALID": "invalid"}[report["verdict"]]
    message = f"{word} ({report['profile']}, {passed} passed{f', {waived} waived' if waived else ''})"
    if report["manifest"]["tolerance"] != "strict":
        message += f", {report['manifest']['tolerance']}"
    if report["verdict"] == "CONFORMANT" and (waived or report["manifest"]["tolerance"] != "strict"):
        colour = "yellow"
    return {"schemaVersion": 1, "label": f"dougong compat: {report['backend']}", "message": message, "color": colour}
