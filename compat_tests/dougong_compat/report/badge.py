"""badge.json in the form that badge services read."""

from __future__ import annotations

from typing import Any

__all__ = ["badge"]


def badge(report: dict[str, Any]) -> dict[str, Any]:
    """Verdict, profile and, where it is not strict, the tolerance class."""
    totals = report["totals"]
    colour = {"CONFORMANT": "brightgreen", "NOT": "red", "INVALID": "lightgrey"}[report["verdict"]]
    word = {"CONFORMANT": "conformant", "NOT": "not conformant", "INVALID": "invalid"}[report["verdict"]]
    message = f"{word} ({report['profile']}, {totals['pass']} passed)"
    if report["manifest"]["tolerance"] != "strict":
        message += f", {report['manifest']['tolerance']}"
        colour = "yellow" if report["verdict"] == "CONFORMANT" else colour
    return {"schemaVersion": 1, "label": f"dougong compat: {report['backend']}", "message": message, "color": colour}
