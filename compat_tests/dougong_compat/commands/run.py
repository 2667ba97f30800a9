"""``run``, ``repro``, ``fuzz``, ``perf``."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from dougong_compat.case import PROFILES
from dougong_compat.commands.progress import progress_bar
from dougong_compat.outcome import UNDECLARED, Outcome, Result
from dougong_compat.target import OpenError, Target

__all__ = ["fuzz", "perf", "repro", "run", "target_of"]

_BACKEND = typer.Option(..., "--backend", "-b", help="The backend's name, as `dougong doctor` shows it.")
_PLUGIN = typer.Option([], "--plugin", help="A plugin module that is not installed (repeatable).")
_MANIFEST = typer.Option(None, "--manifest", help="The backend's compat.toml; default: the one in its package.")
_JSON = typer.Option(False, "--json", help="One JSON object on standard output and nothing else.")
#: Failures that are printed while they come.
_SHOWN = 20


def target_of(backend: str, plugins: list[str]) -> Target:
    """The target of a command; the suite's own demonstration backends need no ``--plugin``."""
    if not plugins:
        from dougong_compat.selftest.backends import BUILT_IN

        plugins = [BUILT_IN[backend]] if backend in BUILT_IN else []
    return Target(backend, tuple(plugins))


def run(
    backend: str = _BACKEND,
    profile: str = typer.Option(
        "core", "--profile", "-p", help="smoke, core, full or certified; each holds the one before."
    ),
    only: list[str] = typer.Option(
        [],
        "--only",
        "-k",
        help="Cases whose id holds this text or glob (repeatable). INVALID then: a verdict needs all.",
    ),
    plugin: list[str] = _PLUGIN,
    manifest: str = _MANIFEST,
    out: Path = typer.Option(
        Path("compat-report"), "--out", "-o", help="Folder for report.json, junit.xml, report.html and badge.json."
    ),
    timeout: float = typer.Option(60.0, help="Seconds that one case may take."),
    jobs: int = typer.Option(1, "--jobs", "-j", min=1, help="Workers that share the cases on one device."),
    budget: float = typer.Option(
        None, min=1.0, help="Seconds after which the run is cut; the report says what was not run (and is INVALID)."
    ),
    resume: Path = typer.Option(
        None, help="The report.json of a run that was cut, or of a smaller profile: run what it lacks, report it all."
    ),
    with_perf: bool = typer.Option(False, "--perf", help="Measure performance too (L5)."),
    as_json: bool = _JSON,
) -> None:
    """Run a profile and write the report.

    Leaves with 0: conformant, 1: something failed, 2: invalid (the run proves nothing; it says why), 3: wrong usage.
    """
    from dougong_compat.perf.measure import measure
    from dougong_compat.report.build import load, reproduction
    from dougong_compat.report.write import write_all
    from dougong_compat.session import Session, run_profile, unopened

    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: one of {', '.join(PROFILES)}")
    console = Console(stderr=True)
    session = Session(target_of(backend, plugin), profile, manifest, only=tuple(only), timeout=timeout)
    session.jobs, session.budget = jobs, budget
    options = session.options
    session.resume = None if resume is None else load(resume)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cut off or interrupted: a report all the same
    with progress_bar(console, quiet=as_json) as progress:
        task = progress.add_task(backend, total=None)
        bad = Counter[Outcome]()

        def started(facts: dict[str, Any], count: int) -> None:
            progress.update(task, total=count)

        seen = 0

        def came(result: Result) -> None:
            nonlocal seen
            seen += 1
            progress.advance(task)
            if seen % 500 == 0 and not console.is_terminal and not as_json:
                console.print(f"{seen} cases")
            if result.outcome.bad:
                bad[result.outcome] += 1
                if sum(bad.values()) <= _SHOWN and not as_json:
                    progress.console.print(
                        f"[red]{result.outcome.value}[/] {escape(result.case_id)}: {escape(result.message[:300])}",
                        soft_wrap=True,
                    )
                    again = reproduction(backend, result.case_id, result.seed, options)
                    progress.console.print(f"  [dim]{escape(again)}[/]", soft_wrap=True, highlight=False)

        try:
            if with_perf:
                session.performance = measure(session.target, manifest_path=manifest)
            report, cases = run_profile(session, started, came)
        except OpenError as error:
            write_all(unopened(session, error), out, {})
            raise
    write_all(report, out, {case.id: case.needs for case in cases})
    if as_json:
        print(json.dumps(report))
    else:
        summary(console, report, out)
    raise typer.Exit({"CONFORMANT": 0, "NOT": 1, "INVALID": 2}[report["verdict"]])


def summary(console: Console, report: dict[str, Any], out: Path) -> None:
    """The last lines of a run."""
    totals = report["totals"]
    colour = {"CONFORMANT": "green", "NOT": "red", "INVALID": "yellow"}[report["verdict"]]
    totals = {**totals, "not run": len(report.get("not_run", ()))}
    counts = ", ".join(f"{count} {name}" for name, count in totals.items() if count and name != "cases")
    console.print(
        f"[bold {colour}]{report['verdict']}[/]  {report['backend']}, {report['profile']}: {counts}, "
        f"{report['seconds']:.0f} s"
    )
    failed = sum(Outcome(case["outcome"]).bad for case in report["cases"])
    if failed > _SHOWN:
        console.print(f"  {_SHOWN} of {failed} failures are shown above; the report has them all")
    for reason in report["reasons"]:
        console.print(f"  {escape(reason)}", soft_wrap=True)
    more = Counter(
        need
        for case in report["cases"]
        for text in case.get("warnings", ())
        if text.startswith(UNDECLARED)
        for need in text.removeprefix(UNDECLARED).split(", ")
    )
    if more:
        names = ", ".join(f"{name} ({count} cases)" for name, count in more.most_common(6))
        console.print(f"  right, and not declared in the manifest: {names}", soft_wrap=True)
    console.print(f"  {out / 'report.html'}")


def repro(
    case: str = typer.Argument(..., help="The case's id."),
    backend: str = _BACKEND,
    seed: int = typer.Option(-1, help="The seed; default: the case's own."),
    params: str = typer.Option("", help="Parameters of an attention case as JSON (from fuzz)."),
    plugin: list[str] = _PLUGIN,
    manifest: str = _MANIFEST,
    guard: bool = typer.Option(False, "--guard", help="A closed page behind every tensor, as profile certified has."),
    as_json: bool = _JSON,
) -> None:
    """Run one case again and show all that is known of it."""
    from dougong_compat.cases import find_case
    from dougong_compat.cases.make import attention_case
    from dougong_compat.contributed import receive
    from dougong_compat.fuzzing import run_one
    from dougong_compat.pool import Worker

    with Worker(target_of(backend, plugin)) as worker:
        if params:
            found = attention_case("fuzz", case.rpartition("/")[2], json.loads(params))
        else:
            known = find_case(case)
            if known is None:  # the plugin's own
                added = receive(worker.start(), "full", ()).cases
                known = next((one for one in added if one.id == case), None)
            if known is None:
                raise ValueError(f"no case is called {case!r}; `dougong compat list` shows them")
            found = known
        if seed >= 0:
            found = dataclasses.replace(found, seed=seed)
        result, message = run_one(worker, found, manifest, guard=guard)
    if as_json:
        print(json.dumps({**result.to_json(), "trace": message.get("trace", ""), "params": dict(found.params)}))
    else:
        console = Console()
        console.print(f"[bold]{result.outcome.value}[/] {escape(found.id)}")
        console.print(escape(result.message or "as it should be"), soft_wrap=True)
        console.print(f"margin {result.margin}  seed {result.seed}  by {escape(result.provider)}")
        console.print(escape(json.dumps(dict(found.params))), soft_wrap=True)
        if message.get("trace"):
            console.print(escape(message["trace"]), soft_wrap=True)
        if found.link:
            console.print(found.link)
    raise typer.Exit(1 if result.outcome.bad else 0)


def fuzz(
    backend: str = _BACKEND,
    count: int = typer.Option(200, help="Examples to try."),
    seed: int = typer.Option(0, help="Where the search begins."),
    plugin: list[str] = _PLUGIN,
    manifest: str = _MANIFEST,
    save: Path = typer.Option(
        Path("compat-failures"), help="Folder where shrunk failures are kept; they are tried first."
    ),
    as_json: bool = _JSON,
) -> None:
    """Search for a failing batch with Hypothesis, shrink it, save it."""
    from dougong_compat.fuzzing import search
    from dougong_compat.session import Session

    console = Console(stderr=True)
    session = Session(target_of(backend, plugin), manifest_path=manifest)
    with progress_bar(console, quiet=as_json) as progress:
        task = progress.add_task(backend, total=count)
        outcome = search(
            session.target, count=count, seed=seed, manifest_path=manifest, folder=save, options=session.options,
            on_try=lambda: progress.advance(task),
        )  # fmt: skip
    if as_json:
        print(json.dumps(outcome))
    elif outcome["failure"] is None:
        console.print(f"[green]{outcome['tried']} examples, none failed[/]")
    else:
        console.print(f"[red]failed[/]: {escape(outcome['failure']['message'])}", soft_wrap=True)
        console.print(escape(outcome["failure"]["reproduce"]), soft_wrap=True)
    raise typer.Exit(0 if outcome["failure"] is None else 1)


def perf(
    backend: str = _BACKEND,
    plugin: list[str] = _PLUGIN,
    manifest: str = _MANIFEST,
    quick: bool = typer.Option(False, help="Small shapes only."),
    out: Path = typer.Option(None, "--out", "-o", help="Write the rows as JSON here too."),
    as_json: bool = _JSON,
) -> None:
    """Measure this device's own ceilings, then attention as a share of them (L5)."""
    from dougong_compat.perf.measure import measure
    from dougong_compat.perf.show import table

    console = Console(stderr=True)
    with progress_bar(console, quiet=as_json) as progress:
        task = progress.add_task(backend, total=None)
        rows = measure(
            target_of(backend, plugin), quick=quick, manifest_path=manifest,
            on_row=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(rows))
    else:
        Console().print(table(rows))
    raise typer.Exit(2 if any(row.get("invalid") for row in rows) else 0)
