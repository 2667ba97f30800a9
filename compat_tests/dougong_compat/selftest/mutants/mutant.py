"""A planted bug: a line of an honest kernel or device replaced, or a method of the block manager."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mutant"]


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in the honest kernels' text and becomes ``new``; with ``manager`` it names a patch instead.

    ``entry``: the catalogue entry that it re-enacts (0: none). ``killed_by``: id of the case named for it.
    ``equivalent``: the argument why no case can tell it from the honest kernel.
    """

    name: str
    backend: str
    killed_by: str
    old: str = ""
    new: str = ""
    entry: int = 0
    manager: str = ""
    equivalent: str = ""
    file: str = "kernels.py"
    """Where ``old`` stands: in the honest kernels, or in the device that works late."""
    also: tuple[tuple[str, str], ...] = ()
    """Further replacements that belong to the same bug."""
