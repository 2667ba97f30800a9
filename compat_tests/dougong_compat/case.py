"""One conformance case: a declarative, JSON-able question to a backend."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dougong_compat import SUITE_VERSION

__all__ = ["LEVELS", "PROFILES", "Case", "KnownFailure", "seed_of"]

LEVELS = ("L0", "L1", "L2", "L3", "L4")

#: In order: each profile holds all cases of those before it. ``certified`` collects what ``full`` does.
PROFILES = ("smoke", "core", "full", "certified")


def seed_of(case_id: str) -> int:
    """The seed of a case's inputs: a hash of the suite's version and the case's id, 63 bits."""
    digest = hashlib.blake2b(f"{SUITE_VERSION}/{case_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Case:
    """What is asked, and what a backend must be able to do to be asked it.

    ``kind`` names the pair (execute in the worker, judge in the parent). ``params`` holds plain JSON values.
    ``needs`` are capability names (see ``manifest``). ``mandatory``: cannot be declared away.
    ``profile`` is the smallest profile that holds it. ``entry`` and ``link`` tie a regression to its bug.
    """

    id: str
    level: str
    kind: str
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    mandatory: bool = False
    profile: str = "core"
    entry: int = 0
    link: str = ""
    note: str = ""
    seed: int = -1
    """-1 stands for the seed of the id; fuzzing and replay give one."""

    @property
    def actual_seed(self) -> int:
        return seed_of(self.id) if self.seed < 0 else self.seed

    def to_json(self) -> dict[str, Any]:
        """The part that a worker needs."""
        return {"id": self.id, "kind": self.kind, "params": dict(self.params), "seed": self.actual_seed}

    def in_profile(self, profile: str) -> bool:
        order = {"smoke": 0, "core": 1, "full": 2, "certified": 2}
        return order[self.profile] <= order[profile]


@dataclass(frozen=True)
class KnownFailure:
    """A plugin's answer to ``dougong_compat_cases``: these cases fail, and an issue says so. ``case`` is a glob over
    ids. The rules of waivers hold: an address, at most 90 days, and a case that passes all the same fails."""

    case: str
    issue: str
    expires: datetime.date
    reason: str = ""
