"""Why a completion ended."""

from __future__ import annotations

from enum import Enum

__all__ = ["FinishReason"]


class FinishReason(str, Enum):
    """The value is the word that OpenAI's and vLLM's APIs use."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value
