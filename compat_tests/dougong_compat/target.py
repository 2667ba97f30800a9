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

    @property
    def plugins_given(self) -> tuple[str, ...]:
        """The plugins that a command line must name: those of the suite's own backends it knows."""
        from dougong_compat.selftest.backends import BUILT_IN

        return () if self.plugins == (BUILT_IN.get(self.backend),) else self.plugins
