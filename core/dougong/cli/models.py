"""``dougong models``: what is on this machine, fetching more, and removing it."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dougong.cli.model_cache import Source, cached_models, pull_model, remove_model
from dougong.errors import ConfigError

__all__ = ["models_app"]

models_app = typer.Typer(help="Models on this machine: list, pull, rm.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
From = Annotated[
    Source | None,
    typer.Option("--source", help="huggingface or modelscope; default: DOUGONG_MODEL_SOURCE, or huggingface."),
]


@models_app.command("list")
def list_models(as_json: Json = False) -> None:
    """Show packaged models, both hubs' caches and unpacked GGUF files, with sizes."""
    found = cached_models()
    if as_json:
        print(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
        return
    console = Console()
    if not found:
        console.print("No model here yet. `dougong models pull ORG/NAME` fetches one.")
        return
    table = Table("name", "from", "size", "last used", "revision", box=None, pad_edge=False, header_style="bold")
    for one in found:
        used = time.strftime("%Y-%m-%d", time.localtime(one.last_used)) if one.last_used else ""
        table.add_row(one.name, one.source, size_text(one.size), used, one.revision[:12])
    console.print(table)
    console.print(f"{size_text(sum(one.size for one in found))} in {len(found)} models", style="dim", highlight=False)


@models_app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Hub id (org/name, modelscope:org/name).", show_default=False)],
    source: From = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    all_files: Annotated[bool, typer.Option("--all-files", help="Also what dougong does not read.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a model into the hub's local cache. An interrupted pull goes on where it stopped.

    HF_ENDPOINT names a mirror of the hub, HF_TOKEN gives access to gated models, HF_HOME moves the cache;
    MODELSCOPE_CACHE moves ModelScope's.
    """
    pulled = pull_model(name, source=source, revision=revision, all_files=all_files)
    if as_json:
        print(json.dumps(pulled.to_dict(), ensure_ascii=False))
        return
    console = Console(soft_wrap=True)
    console.print(f"[bold]{pulled.name}[/]: {size_text(pulled.size)} in {pulled.path}", highlight=False)
    console.print(f"Serve it: dougong serve {pulled.serve_as}", style="dim", highlight=False)


@models_app.command()
def rm(
    name: Annotated[str, typer.Argument(help="As `dougong models list` shows it.", show_default=False)],
    source: From = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a model from this machine's cache."""
    matches = [one for one in cached_models() if one.name == name and source in (None, one.source)]
    if len(matches) > 1:
        held = ", ".join(one.source for one in matches)
        raise ConfigError(f"{name!r} is here from {held}: say which with --source.")
    if not matches:
        raise ConfigError(f"no model {name!r} is cached here; `dougong models list` shows those that are.")
    model = matches[0]
    if not yes and not typer.confirm(f"Remove {model.name} ({model.source}, {size_text(model.size)})?"):
        raise typer.Exit(1)
    freed = remove_model(model)
    if as_json:
        print(json.dumps({"removed": model.name, "freed": freed}))
    else:
        print(f"removed {model.name}: {size_text(freed)} free again")


def size_text(size: int) -> str:
    """In units of 1024: 94.2 MiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
