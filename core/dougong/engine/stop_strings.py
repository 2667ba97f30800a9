"""Finding stop strings in streamed text, holding back what may become one."""

from __future__ import annotations

__all__ = ["StopStrings"]


class StopStrings:
    """Watches one completion's text for any of ``stop``.

    Text that could be the beginning of a stop string is held back, so that a consumer never sees part of one.
    """

    __slots__ = ("_held", "_include", "_longest", "_stop")

    def __init__(self, stop: tuple[str, ...], include_in_output: bool = False) -> None:
        self._stop = stop
        self._include = include_in_output
        self._longest = max(map(len, stop))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; returns (text that may be shown, the stop string found or None)."""
        window = self._held + text
        first: tuple[int, str] | None = None
        for stop in self._stop:
            at = window.find(stop)
            if at >= 0 and (first is None or at < first[0]):
                first = (at, stop)
        if first is not None:
            at, stop = first
            self._held = ""
            return window[: at + len(stop) if self._include else at], stop
        keep = self._partial(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def flush(self) -> str:
        """What was held back, when no text will follow."""
        held, self._held = self._held, ""
        return held

    def _partial(self, window: str) -> int:
        """Length of the longest end of ``window`` that begins a stop string."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[len(window) - length :]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
