"""Two reports compared: what broke, what mended, and margins that drift towards the bound."""

from __future__ import annotations

from typing import Any

__all__ = ["diff", "render"]

_GOOD = ("PASS", "UNSUPPORTED", "WAIVED")


def diff(old: dict[str, Any], new: dict[str, Any], drift: float = 1.25) -> dict[str, Any]:
    """Changes from ``old`` to ``new``. A margin drifts when it grew by ``drift`` and stands above 0.25 of its bound."""
    before = {case["id"]: case for case in old["cases"]}
    after = {case["id"]: case for case in new["cases"]}
    changed, drifted, slower = [], [], []
    for name, now in after.items():
        was = before.get(name)
        if was is None:
            continue
        if was["outcome"] != now["outcome"]:
            changed.append(
                {"id": name, "before": was["outcome"], "after": now["outcome"], "message": now.get("message", "")}
            )
        a, b = was.get("margin"), now.get("margin")
        if a is not None and b is not None and now["outcome"] == "PASS" and b > 0.25 and b > a * drift:
            drifted.append({"id": name, "before": a, "after": b})
    old_perf = {row["name"]: row for row in old.get("performance", [])}
    for row in new.get("performance", []):
        was = old_perf.get(row["name"])
        if was and was.get("share") and row.get("share") and row["share"] < was["share"] * 0.9:
            slower.append({"name": row["name"], "before": was["share"], "after": row["share"]})
    return {
        "verdict": [old["verdict"], new["verdict"]],
        "broken": [c for c in changed if c["before"] in _GOOD and c["after"] not in _GOOD],
        "mended": [c for c in changed if c["before"] not in _GOOD and c["after"] in _GOOD],
        "other": [c for c in changed if (c["before"] in _GOOD) == (c["after"] in _GOOD)],
        "gone": sorted(set(before) - set(after)),
        "new": sorted(set(after) - set(before)),
        "drifted": sorted(drifted, key=lambda one: -one["after"]),
        "slower": slower,
    }


def render(change: dict[str, Any]) -> str:
    """Plain lines for a terminal."""
    lines = [f"verdict: {change['verdict'][0]} -> {change['verdict'][1]}"]
    for key, title in (("broken", "broken"), ("mended", "mended"), ("other", "changed otherwise")):
        for one in change[key]:
            lines.append(f"{title}: {one['id']}: {one['before']} -> {one['after']} {one['message'][:120]}".rstrip())
    for one in change["drifted"]:
        lines.append(f"drifts: {one['id']}: margin {one['before']:.3f} -> {one['after']:.3f}")
    for one in change["slower"]:
        lines.append(f"slower: {one['name']}: {one['before']:.0%} -> {one['after']:.0%} of the ceiling")
    if change["gone"]:
        lines.append(f"{len(change['gone'])} cases are gone, e.g. {change['gone'][0]}")
    if change["new"]:
        lines.append(f"{len(change['new'])} cases are new, e.g. {change['new'][0]}")
    return "\n".join(lines)
