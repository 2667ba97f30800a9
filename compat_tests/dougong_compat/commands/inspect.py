"""``support``, ``list``, ``report``, ``diff``, ``verify``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from dougong_compat.case import PROFILES
from dougong_compat.commands.run import target_of

__all__ = ["diff_reports", "list_cases", "report", "support", "verify"]

_BACKEND = typer.Option(..., "--backend", "-b", help="The backend's name.")
_JSON = typer.Option(False, "--json", help="One JSON object on standard output and nothing else.")


def support(
    backend: str = _BACKEND,
    plugin: list[str] = typer.Option([], "--plugin", help="A plugin module that is not installed (repeatable)."),
    manifest: str = typer.Option(None, "--manifest", help="The backend's compat.toml."),
    as_json: bool = _JSON,
) -> None:
    """What the backend declares, and how many cases of each capability its word covers."""
    from dougong_compat.cases import collect_profile
    from dougong_compat.manifest import find
    from dougong_compat.pool import Worker

    target = target_of(backend, plugin)
    with Worker(target) as worker:
        facts = worker.start()
    declared = find(facts, manifest, target.plugins)
    cases = collect_profile("core")
    covered = [case for case in cases if case.mandatory or not declared.undeclared(case.needs)]
    by_need = Counter(need for case in cases for need in case.needs)
    body = {
        "backend": backend,
        "manifest": declared.to_json(),
        "facts": facts,
        "core_cases": len(cases),
        "declared_cases": len(covered),
        "capabilities": {
            need: {"declared": declared.declares(need), "cases": n} for need, n in sorted(by_need.items())
        },
    }
    if as_json:
        print(json.dumps(body))
        return
    table = Table(
        "capability", "declared", "cases", title=f"{backend}: {len(covered)} of {len(cases)} core cases declared"
    )
    for need, count in sorted(by_need.items()):
        table.add_row(need, "[green]yes[/]" if declared.declares(need) else "[dim]no[/]", str(count))
    Console().print(table)
    Console().print(f"manifest: {declared.source}")


def list_cases(
    profile: str = typer.Option("core", "--profile", "-p", help="smoke, core, full or certified."),
    only: list[str] = typer.Option([], "--only", "-k", help="Cases whose id holds this text or glob."),
    publish: Path = typer.Option(
        None, help="Write the profiles' must-pass files into this folder (for the suite's own release)."
    ),
    as_json: bool = _JSON,
) -> None:
    """The cases of a profile."""
    from dougong_compat.cases import collect_profile
    from dougong_compat.honesty import mustpass_hash
    from dougong_compat.session import select

    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: one of {', '.join(PROFILES)}")
    if publish is not None:
        for name in ("smoke", "core", "full"):
            ids = sorted(case.id for case in collect_profile(name))
            (publish / f"{name}.txt").write_text(
                f"# sha256 {mustpass_hash(ids)}\n" + "\n".join(ids) + "\n", encoding="utf-8"
            )
    cases = select(collect_profile(profile), only)
    if as_json:
        print(
            json.dumps(
                [
                    {"id": c.id, "kind": c.kind, "needs": c.needs, "mandatory": c.mandatory, "link": c.link}
                    for c in cases
                ]
            )
        )
        return
    for case in cases:
        print(case.id)
    levels = Counter(case.level for case in cases)
    Console(stderr=True).print(
        f"{len(cases)} cases: " + ", ".join(f"{level} {levels[level]}" for level in sorted(levels))
    )


def report(
    path: Path = typer.Argument(..., help="A report.json."),
    out: Path = typer.Option(None, "--out", "-o", help="Folder; default: beside the report."),
) -> None:
    """Write HTML, JUnit and badge from a report.json again."""
    from dougong_compat.cases import collect_profile
    from dougong_compat.report.build import load
    from dougong_compat.report.write import write_all

    data = load(path)
    write_all(data, out or path.parent, {case.id: case.needs for case in collect_profile(data["profile"])})


def diff_reports(
    old: Path = typer.Argument(..., help="The earlier report.json."),
    new: Path = typer.Argument(..., help="The later one."),
    as_json: bool = _JSON,
) -> None:
    """Compare two reports: broken, mended, drifting margins. Exit 1 if anything broke."""
    from dougong_compat.report.build import load
    from dougong_compat.report.diff import diff, render

    change = diff(load(old), load(new))
    print(json.dumps(change) if as_json else render(change))
    raise typer.Exit(1 if change["broken"] else 0)


def verify(path: Path = typer.Argument(..., help="A report.json."), as_json: bool = _JSON) -> None:
    """Check a report that someone else made: schema, cases, sums, verdict. Exit 2 if it does not hold together."""
    from dougong_compat.report.verify import faults

    found = faults(json.loads(path.read_text(encoding="utf-8")))
    if as_json:
        print(json.dumps({"faults": found}))
    else:
        print("\n".join(found) if found else "the report holds together")
    raise typer.Exit(2 if found else 0)
