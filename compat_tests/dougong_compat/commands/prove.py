"""``selftest``: the suite proves that it catches what it should."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from dougong_compat.commands.progress import progress_bar

__all__ = ["selftest"]


def selftest(
    only: list[str] = typer.Option([], "--only", "-k", help="Mutants whose name holds this text."),
    honest: bool = typer.Option(True, help="Run the honest backends and the cheats too."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object with killed, equivalent and survivors."),
) -> None:
    """Plant bugs in honest backends and see each killed by the case named for it."""
    from dougong_compat.selftest.prove import prove

    console = Console(stderr=True)
    with progress_bar(console, quiet=as_json) as progress:
        task = progress.add_task("mutants", total=None)
        outcome = prove(
            only, honest=honest,
            say=None if as_json else lambda text: progress.console.print(text, markup=False, soft_wrap=True),
            on_mutant=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        print(json.dumps(outcome))
    else:
        others = outcome["wrong"] or ("as they should be" if honest else "not asked")
        console.print(
            f"{len(outcome['killed'])} killed, {len(outcome['equivalent'])} equivalent, "
            f"{len(outcome['survivors'])} survive; honest backends and cheats: {others}",
            markup=False,
            soft_wrap=True,
        )
    total = len(outcome["killed"]) + len(outcome["survivors"])
    raise typer.Exit(0 if not outcome["wrong"] and (not total or len(outcome["killed"]) >= 0.95 * total) else 1)
