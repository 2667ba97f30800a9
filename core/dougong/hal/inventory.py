"""Accelerators that seem to be in this machine, whether or not a plugin for them is installed.

The table is data (``accelerators.json``): no code here knows a vendor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

__all__ = ["SeenAccelerator", "seen_accelerators"]


@dataclass(frozen=True)
class SeenAccelerator:
    """A product whose driver left a trace (``trace``), the backend that would serve it, and how to install that."""

    product: str
    trace: str
    backend: str
    install: str


def seen_accelerators(root: Path = Path("/")) -> list[SeenAccelerator]:
    """Look for drivers' device files; opens none of them. ``root`` is for tests."""
    table = json.loads(files("dougong.hal").joinpath("accelerators.json").read_text("utf-8"))
    found = []
    for entry in table:
        for path in entry["paths"]:
            if (root / path.lstrip("/")).exists() and _has_card(entry, root):
                found.append(SeenAccelerator(entry["product"], path, entry["backend"], entry["install"]))
                break
    return found


def _has_card(entry: dict[str, str], root: Path) -> bool:
    """Where a driver module also serves display controllers, ask for a render node of that vendor."""
    vendor = entry.get("pci_vendor")
    if vendor is None:
        return True
    cards = (root / "sys/class/drm").glob("renderD*/device/vendor")
    return any(card.read_text().strip() == vendor for card in cards)
