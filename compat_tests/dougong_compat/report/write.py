"""All the files of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dougong_compat.report.badge import badge
from dougong_compat.report.html import html
from dougong_compat.report.junit import junit

__all__ = ["write_all"]


def write_all(report: dict[str, Any], folder: Path, needs: dict[str, tuple[str, ...]]) -> None:
    """report.json, junit.xml, report.html and badge.json in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "junit.xml").write_text(junit(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report, needs), encoding="utf-8")
    (folder / "badge.json").write_text(json.dumps(badge(report), indent=1) + "\n", encoding="utf-8")
