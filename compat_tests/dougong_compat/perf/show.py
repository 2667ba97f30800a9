"""Performance rows for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

__all__ = ["table"]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Name, time, what was achieved, which ceiling is near, and the share of it."""
    shown = Table("shape", "µs", "achieved", "bound by", "share")
    for row in rows:
        share = "" if row.get("share") is None else f"{row['share']:.0%}"
        if row.get("invalid"):
            share = f"[red]{share} invalid[/]"
        shown.add_row(
            row["name"], f"{row['microseconds']:.1f}" if "microseconds" in row else "", row.get("achieved", ""),
            row.get("ceiling", "") or row.get("message", ""), share,
        )  # fmt: skip
    return shown
