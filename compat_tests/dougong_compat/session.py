"""A whole run: open, collect, execute, judge, report."""

from __future__ import annotations

import datetime
import fnmatch
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dougong_compat import integrity
from dougong_compat.case import Case
from dougong_compat.cases import collect_profile
from dougong_compat.contributed import receive
from dougong_compat.fuzzing import Found, of_a_profile
from dougong_compat.honesty import Verdict, mustpass_hash, unmet, verdict_of
from dougong_compat.manifest import Manifest, find
from dougong_compat.outcome import Result
from dougong_compat.pool import Clock, Target, Worker
from dougong_compat.report.build import build
from dougong_compat.resume import parts_of, same_run, stood
from dougong_compat.run import Runner

__all__ = ["Session", "run_profile", "select", "unopened"]


@dataclass
class Session:
    """What a run needs to know besides its target."""

    target: Target
    profile: str = "core"
    manifest_path: str | None = None
    manifest: Manifest | None = None
    only: tuple[str, ...] = ()
    timeout: float = 60.0
    jobs: int = 1
    """Workers that share the cases on one device."""
    budget: float | None = None
    """Seconds after which no further case is asked; the report then says what was not run."""
    resume: Mapping[str, Any] | None = None
    """The report of a run that was cut, or of a smaller profile: only the cases that it lacks are run."""
    floors: dict[str, int] | None = None
    performance: Sequence[dict[str, Any]] = ()

    @property
    def options(self) -> str:
        """What `repro` must be told besides backend, seed and case, with a blank before it."""
        words = [word for plugin in self.target.plugins_given for word in ("--plugin", plugin)]
        words += ["--manifest", self.manifest_path] if self.manifest_path else []
        words += ["--guard"] if self.profile == "certified" else []
        return "".join(f" {shlex.quote(word)}" for word in words)


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
    clock = Clock(session.budget)
    with ExitStack() as alive:
        worker, *more = [
            alive.enter_context(Worker(session.target, timeout=session.timeout)) for _ in range(max(1, session.jobs))
        ]
        facts = worker.start()
        manifest = session.manifest or find(facts, session.manifest_path, session.target.plugins)
        added = receive(facts, session.profile, (case.id for case in cases))
        manifest = added.extend(manifest)
        chosen = select([*cases, *added.cases], session.only)
        kept: dict[str, Result] = {}
        if session.resume is not None:
            sha256 = mustpass_hash(case.id for case in collect_profile(session.resume["profile"]))
            same_run(session.resume, facts, manifest.to_json(), session.profile, sha256)
            kept = {result.case_id: result for result in stood(session.resume)}
        left = [case for case in chosen if case.id not in kept]
        if on_start is not None:
            on_start(facts, len(left))
        runner = Runner(worker, manifest, today, guard)
        results = runner.run(left, on_result, more=more, clock=clock)
        searched = _searched(session, runner, clock)
        jobs = sum(one.started for one in (worker, *more))
        restarts = sum(one.restarts for one in (worker, *more))
    seconds = time.monotonic() - started
    parts = [*parts_of(session.resume), _part(seconds, len(results))] if session.resume is not None else []
    fresh = {result.case_id: result for result in results} | kept
    results = [fresh[case.id] for case in chosen if case.id in fresh] + searched.results
    came = {result.case_id for result in results}
    not_run = [case.id for case in chosen if case.id not in came]
    verdict = verdict_of(
        session.profile,
        cases,
        results,
        manifest,
        today,
        selected=bool(session.only),
        reserved=session.floors,
        problems=[
            *added.problems,
            *unmet(facts, manifest, session.profile),
            *searched.problems,
            *(f"a plugin changed the suite in the process that judges: {what}" for what in integrity.changes()),
        ],
        cut=_why(clock, session, len(not_run), len(chosen)) if not_run else "",
    )
    report = build(
        profile=session.profile, facts=facts, manifest=manifest, cases=cases, results=results, verdict=verdict,
        seconds=sum(part["seconds"] for part in parts) or seconds, restarts=restarts,
        performance=session.performance, jobs=jobs, not_run=not_run, parts=parts, options=session.options,
        fuzzing=searched.report,
    )  # fmt: skip
    return report, chosen


def _searched(session: Session, runner: Runner, clock: Clock) -> Found:
    """The search that belongs to the profile, or what the run before this one found."""
    if session.only or session.profile not in ("full", "certified"):
        return Found()
    if session.resume is not None and "fuzzing" in session.resume:
        found = [result for result in stood(session.resume) if result.case_id.split("/")[1] == "fuzz"]
        return Found(dict(session.resume["fuzzing"]), found)
    if clock.over:
        return Found(problems=["there was no time left for the search for failing batches"])
    return of_a_profile(runner, clock, session.options)


def unopened(session: Session, error: Exception) -> dict[str, Any]:
    """The report of a run that came to nothing: the backend is not known, or its plugin cannot be opened."""
    cases = collect_profile(session.profile)
    return build(
        profile=session.profile, facts={"backend": session.target.backend}, cases=cases, results=[], seconds=0.0,
        manifest=Manifest(session.target.backend, {}, frozenset()), jobs=session.jobs,
        verdict=Verdict("INVALID", [f"the backend could not be opened: {error}"]),
        not_run=[case.id for case in select(cases, session.only)],
    )  # fmt: skip


def _part(seconds: float, cases: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"when": now, "seconds": round(seconds, 2), "cases": cases}


def _why(clock: Clock, session: Session, left: int, total: int) -> str:
    """Why a run came to no end."""
    why = "the run was interrupted" if clock.interrupted else f"the budget of {session.budget:g} s was spent"
    return f"{why}: {left} of {total} cases were not run"
