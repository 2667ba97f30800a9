"""What a case can come to, and what the parent says of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = ["UNDECLARED", "Judgement", "Outcome", "Result"]

#: How the warning begins that names, after it, capabilities that are there and not declared.
UNDECLARED = "does what it does not declare: "


class Outcome(str, Enum):
    """FAIL to TIMEOUT and XPASS stand against conformance; UNSUPPORTED and WAIVED do not."""

    PASS = "PASS"
    FAIL = "FAIL"
    ERROR = "ERROR"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"
    UNSUPPORTED = "UNSUPPORTED"
    WAIVED = "WAIVED"
    XPASS = "XPASS"

    @property
    def bad(self) -> bool:
        return self in _BAD

    @property
    def executed(self) -> bool:
        """Whether the backend did the work, and is judged by it: neither refused nor waived."""
        return self not in (Outcome.UNSUPPORTED, Outcome.WAIVED)


_BAD = frozenset({Outcome.FAIL, Outcome.ERROR, Outcome.CRASH, Outcome.TIMEOUT, Outcome.XPASS})


@dataclass(frozen=True)
class Judgement:
    """The parent's opinion of an answer. ``margin`` is error / bound: 1 is just right, below is better."""

    ok: bool
    message: str = ""
    margin: float | None = None


@dataclass
class Result:
    """The outcome of one case."""

    case_id: str
    level: str
    outcome: Outcome
    message: str = ""
    margin: float | None = None
    seconds: float = 0.0
    provider: str = ""
    warnings: list[str] = field(default_factory=list)
    seed: int = 0
    entry: int = 0
    link: str = ""
    reproduce: str = ""
    """The line that runs it again, where that is not the usual one."""

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.case_id,
            "level": self.level,
            "outcome": self.outcome.value,
            "seconds": round(self.seconds, 5),
            "seed": self.seed,
        }
        if self.margin is not None:
            body["margin"] = round(self.margin, 6) if self.margin == self.margin else None
        for name in ("message", "provider", "link"):
            if getattr(self, name):
                body[name] = getattr(self, name)
        if self.warnings:
            body["warnings"] = self.warnings
        if self.entry:
            body["entry"] = self.entry
        return body
