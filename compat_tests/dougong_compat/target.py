"""What is put under test, and the error of not getting it open. Imports no torch: the command line starts with it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OpenError", "Target"]


class OpenError(Exception):
    """The backend could not be opened in a worker: a usage error."""


@dataclass(frozen=True)
class Target:
    """The backend under test: its name, plugin modules that are not installed, and a planted bug (self-test)."""

    backend: str
    plugins: tuple[str, ...] = ()
    mutant: str = ""
