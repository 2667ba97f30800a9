"""What plugins add to a run through the hook ``dougong_compat_cases``: cases of their own, and failures they know of.

Added cases stand beside the suite's and never replace one; known failures are waivers, under the same rules as those of
the manifest. An answer that is neither makes the run INVALID, with the plugin's name.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from dougong_compat.case import LEVELS, PROFILES, Case, KnownFailure
from dougong_compat.manifest import Manifest, Waiver

__all__ = ["Contribution", "describe", "receive"]

_FIELDS = ("id", "level", "kind", "params", "needs", "profile", "link", "note", "seed")


@dataclasses.dataclass
class Contribution:
    """``cases``: of the profile that runs. ``waivers``: known failures. ``problems``: why the run cannot count."""

    cases: list[Case]
    waivers: tuple[Waiver, ...]
    problems: list[str]

    def extend(self, manifest: Manifest) -> Manifest:
        """The manifest with the known failures in it."""
        return dataclasses.replace(manifest, waivers=manifest.waivers + self.waivers)


def describe(answers: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    """(plugin, answer) pairs in the worker -> plain JSON for the parent. What is neither a case nor a known failure is
    described as what it is."""
    rows: list[dict[str, Any]] = []
    for plugin, answer in answers:
        if isinstance(answer, Case):
            body = {name: getattr(answer, name) for name in _FIELDS}
            rows.append({"plugin": plugin, "case": body | {"params": dict(answer.params), "needs": list(answer.needs)}})
        elif isinstance(answer, KnownFailure):
            known = {name: str(getattr(answer, name)) for name in ("case", "issue", "expires", "reason")}
            rows.append({"plugin": plugin, "known": known})
        else:
            rows.append({"plugin": plugin, "wrong": f"{answer!r:.200} ({type(answer).__name__})"})
    return rows


def receive(facts: Mapping[str, Any], profile: str, taken: Iterable[str]) -> Contribution:
    """The contribution that a worker's facts carry, for a run of ``profile``. ``taken``: ids of the suite's cases."""
    known_ids = set(taken)
    cases: list[Case] = []
    waivers: list[Waiver] = []
    problems: list[str] = []
    for row in facts.get("contributed", ()):
        plugin = str(row["plugin"])
        if "case" in row:
            case = Case(**{**row["case"], "needs": tuple(row["case"]["needs"])})
            reason = _refusal(case, str(facts["backend"]), known_ids)
            if reason:
                problems.append(f"plugin {plugin!r}: case {case.id!r} {reason}")
                continue
            known_ids.add(case.id)
            if case.in_profile(profile):
                cases.append(case)
        elif "known" in row:
            known = row["known"]
            try:
                expires = datetime.date.fromisoformat(known["expires"])
            except ValueError:
                problems.append(
                    f"plugin {plugin!r}: a known failure of {known['case']!r} expires on {known['expires']!r}; a date"
                )
                continue
            waivers.append(Waiver(known["case"], known["issue"], expires, known["reason"]))
        else:
            problems.append(
                f"plugin {plugin!r}: dougong_compat_cases answered {row['wrong']}; expected Case or KnownFailure"
            )
    return Contribution(cases, tuple(waivers), problems)


def _refusal(case: Case, backend: str, taken: set[str]) -> str:
    from dougong_compat.judge import kinds

    start = f"{case.level}/plugin/{backend}/"
    if case.level not in LEVELS or case.profile not in PROFILES[:3]:
        return f"has level {case.level!r} and profile {case.profile!r}; {', '.join(LEVELS)} and smoke, core or full"
    if not case.id.startswith(start):
        return f"must be called {start}…"
    if case.id in taken:
        return "is there twice"
    if case.kind not in kinds.KINDS:
        return f"is of kind {case.kind!r}; one of {', '.join(sorted(kinds.KINDS))}"
    return ""
