"""``dougong new-backend NAME``."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from dougong_compat.template.write import write_package

__all__ = ["new_backend"]


def new_backend(
    name: str = typer.Argument(..., help="The backend's name: lower-case, as users will type it."),
    out: Path = typer.Option(None, "--out", "-o", help="Folder; default: ./dougong-NAME."),
) -> None:
    """Write a new vendor's package: backend, manifest, test, CI workflow, README. It runs on the host as it is."""
    folder = out or Path(f"dougong-{name.replace('_', '-')}")
    console = Console(stderr=True)
    try:
        written = write_package(name, folder)
    except ValueError as error:
        console.print(f"[bold red]{error}[/]", soft_wrap=True)
        raise typer.Exit(3) from error
    for path in written:
        print(path)
    console.print(
        f"Next: pip install -e {folder}, then dougong compat run --backend {name} --profile smoke", soft_wrap=True
    )
