"""A whole run: open, collect, execute, judge, report."""

from __future__ import annotations

import datetime
import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases import collect_profile
from dougong_compat.contributed import receive
from dougong_compat.honesty import verdict_of
from dougong_compat.manifest import Manifest, find
from dougong_compat.outcome import Result
from dougong_compat.pool import Target, Worker
from dougong_compat.report.build import build
from dougong_compat.run import Runner

__all__ = ["Session", "run_profile", "select"]


@dataclass
class Session:
    """What a run needs to know besides its target."""

    target: Target
    profile: str = "core"
    manifest_path: str | None = None
    manifest: Manifest | None = None
    only: tuple[str, ...] = ()
    timeout: float = 60.0
    floors: dict[str, int] | None = None
    performance: Sequence[dict[str, Any]] = ()


def select(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Cases whose id holds, or matches as a glob, one of ``patterns``; all of them without any."""
    if not patterns:
        return list(cases)
    return [case for case in cases if any(p in case.id or fnmatch.fnmatchcase(case.id, p) for p in patterns)]


def run_profile(
    session: Session,
    on_start: Callable[[dict[str, Any], int], None] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> tuple[dict[str, Any], list[Case]]:
    """Run and report; (report, cases run: the suite's, then the plugin's own).

    Raises:
        OpenError: the backend cannot be opened. ManifestError: its manifest cannot be used.
    """
    cases = collect_profile(session.profile)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    started = time.monotonic()
    guard = session.profile == "certified"
    with Worker(session.target, timeout=session.timeout) as worker:
        facts = worker.start()
        manifest = session.manifest or find(facts, session.manifest_path, session.target.plugins)
        added = receive(facts, session.profile, (case.id for case in cases))
        manifest = added.extend(manifest)
        chosen = select([*cases, *added.cases], session.only)
        if on_start is not None:
            on_start(facts, len(chosen))
        results = list(Runner(worker, manifest, today, guard).run(chosen, on_result))
        restarts = worker.restarts
    verdict = verdict_of(
        session.profile,
        cases,
        results,
        manifest,
        today,
        selected=bool(session.only),
        reserved=session.floors,
        problems=added.problems,
    )
    report = build(
        profile=session.profile, facts=facts, manifest=manifest, cases=cases, results=results, verdict=verdict,
        seconds=time.monotonic() - started, restarts=restarts, performance=session.performance,
    )  # fmt: skip
    return report, chosen
