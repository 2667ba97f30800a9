"""Streaming text that may turn out to be a mark: how much of it must be held back."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["find_first", "held_length"]


def held_length(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins one of ``marks`` without being one."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0


def find_first(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """(place, mark) of the first of ``marks`` in ``text``."""
    found = [(place, mark) for mark in marks if (place := text.find(mark, start)) >= 0]
    return min(found, default=None, key=lambda one: (one[0], -len(one[1])))
