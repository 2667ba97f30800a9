"""The rules that keep a report honest: which cases must have run, how many, and what a verdict may rest on."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from dougong_compat.case import LEVELS, Case
from dougong_compat.manifest import Manifest
from dougong_compat.outcome import Outcome, Result

__all__ = ["FLOORS", "Verdict", "mustpass_hash", "mustpass_ids", "unmet", "verdict_of"]

#: Cases that must have been executed (not refused), per profile and level. A backend that refuses its way below is
#: INVALID. About half of what a backend without optional features executes.
FLOORS: dict[str, dict[str, int]] = {
    "smoke": {"L0": 40, "L1": 60, "L2": 40, "L3": 0, "L4": 0},
    "core": {"L0": 45, "L1": 700, "L2": 350, "L3": 0, "L4": 0},
    "full": {"L0": 45, "L1": 800, "L2": 350, "L3": 0, "L4": 20},
    "certified": {"L0": 45, "L1": 800, "L2": 350, "L3": 40, "L4": 20},
}


@dataclass
class Verdict:
    """CONFORMANT, NOT or INVALID, and why."""

    word: str
    reasons: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"CONFORMANT": 0, "NOT": 1, "INVALID": 2}[self.word]


def mustpass_ids(profile: str) -> list[str]:
    """Ids that a run of ``profile`` must hold, from the file that is published with the suite."""
    name = "full" if profile == "certified" else profile
    text = (resources.files("dougong_compat") / "mustpass" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def mustpass_hash(ids: Iterable[str]) -> str:
    """SHA-256 over the sorted ids, one a line."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def unmet(facts: Mapping[str, Any], manifest: Manifest, profile: str) -> list[str]:
    """What is mandatory and shows in no single case: a 16-bit dtype off the CPU; guard pages for ``certified``."""
    found = []
    on_host = facts["device_type"] == "cpu"
    here = [name for name in facts["dtypes"] if manifest.declares(f"dtype:{name}")]
    if not on_host and not {"float16", "bfloat16"} & set(here):
        found.append(f"float16 or bfloat16 is mandatory; device and manifest share {', '.join(here) or 'no dtype'}")
    if profile == "certified" and on_host and not facts.get("guard_pages", True):
        found.append("certified needs guard pages, which this platform has not")
    return found


def verdict_of(
    profile: str,
    required: Sequence[Case],
    results: Sequence[Result],
    manifest: Manifest,
    today: datetime.date,
    *,
    selected: bool = False,
    reserved: Mapping[str, int] | None = None,
    problems: Sequence[str] = (),
    cut: str = "",
) -> Verdict:
    """The verdict of a run.

    Args:
        required: the profile's cases as collected.
        selected: the user ran a selection only: no verdict above INVALID is possible.
        reserved: floors to use in place of the profile's (the suite's own tests).
        problems: further reasons why the run cannot count.
        cut: why not all cases were run, where that is known.

    Cases of the backend's own plugin may be among ``results``: they must pass, and fill no floor.
    """
    invalid = [*manifest.problems(today), *problems]
    ids = {case.id for case in required}
    published = set(mustpass_ids(profile))
    if ids != published:
        missing, extra = sorted(published - ids)[:3], sorted(ids - published)[:3]
        invalid.append(f"collected cases are not those published for {profile}: missing {missing}, unknown {extra}")
    came = {result.case_id for result in results}
    absent = ids - came
    if absent and (cut or not selected):
        invalid.append(f"{cut or f'{len(absent)} cases have no outcome'}, e.g. {sorted(absent)[0]}")
    if selected:
        invalid.append("only a selection was run: a verdict needs the whole profile")
    if not results:
        invalid.append("no case was run")
    doubled = len(results) - len(came)
    if doubled:
        invalid.append(f"{doubled} cases have more than one outcome: nothing is run twice")
    floors = reserved if reserved is not None else FLOORS[profile]
    for level in LEVELS:
        executed = sum(
            1 for result in results if result.level == level and result.case_id in ids and result.outcome.executed
        )
        if executed < floors.get(level, 0) and not selected and not cut:
            invalid.append(f"{level}: {executed} cases executed, the floor is {floors[level]}")
    if profile == "certified":
        mandatory = {case.id for case in required if case.mandatory}
        waived = [
            result.case_id for result in results if result.outcome is Outcome.WAIVED and result.case_id in mandatory
        ]
        if waived:
            invalid.append(f"certified allows no waiver on mandatory cases: {waived[:3]}")
        skipped = [
            result.case_id
            for result in results
            if result.outcome is Outcome.UNSUPPORTED and result.case_id in mandatory
        ]
        if skipped:
            invalid.append(f"certified skips no mandatory case, for lack of memory either: {skipped[:3]}")
        if manifest.tolerance != "strict":
            invalid.append("certified allows no relaxed tolerance")
    if invalid:
        return Verdict("INVALID", invalid)
    bad = [result for result in results if result.outcome.bad]
    if bad:
        return Verdict("NOT", [f"{len(bad)} cases failed, e.g. {bad[0].case_id}: {bad[0].message[:200]}"])
    return Verdict("CONFORMANT")
