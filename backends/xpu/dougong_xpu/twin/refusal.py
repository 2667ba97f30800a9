"""The error of an operator that will not do what it was asked."""

from __future__ import annotations

__all__ = ["TwinRefusal", "require"]


class TwinRefusal(RuntimeError):
    """What the real operator refuses, or what its documents leave open."""


def require(holds: bool, operator: str, rule: str) -> None:
    """Refuse with ``rule`` unless it holds."""
    if not holds:
        raise TwinRefusal(f"{operator}: {rule}")
