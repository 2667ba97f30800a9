"""The Typer application, and how errors leave it."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from dougong.errors import DougongError, InvalidRequestError

if TYPE_CHECKING:
    from dougong.plugins import Plugins

__all__ = ["build_app", "main"]


def build_app() -> typer.Typer:
    """The application with the core's commands and those of plugins.

    Raises:
        PluginError: a plugin cannot be used.
    """
    from dougong.cli.bench import bench_app
    from dougong.cli.chat import chat
    from dougong.cli.doctor import doctor
    from dougong.cli.generate import generate
    from dougong.cli.models import models_app
    from dougong.cli.serve import keys_app, serve_command
    from dougong.plugins import load_plugins

    app = typer.Typer(
        name="dougong",
        help="dougong (斗拱): one LLM serving core for every accelerator.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command()(generate)
    app.command()(chat)
    app.command()(doctor)
    # As vLLM's: --max_model_len is --max-model-len.
    app.command("serve", context_settings={"token_normalize_func": lambda token: token.replace("_", "-")})(
        serve_command()
    )
    app.add_typer(keys_app, name="keys")
    app.add_typer(models_app, name="models")
    app.add_typer(bench_app, name="bench")
    # A broken plugin must not keep `doctor` from telling about it: errors are raised where engines start.
    _add_plugin_commands(app, load_plugins(strict=False))
    return app


def _add_plugin_commands(app: typer.Typer, plugins: Plugins) -> None:
    """Ask plugins one by one: one whose commands fail to load is named, and the other commands stay usable."""
    for hook in plugins.manager.hook.dougong_cli.get_hookimpls():
        try:
            hook.function(**dict.fromkeys(hook.argnames, app))
        except Exception as error:
            print(
                f"dougong: plugin {hook.plugin_name!r} {plugins.version(hook.plugin_name)} cannot add its commands: "
                f"{type(error).__name__}: {error}. Mend or upgrade it, or exclude it with "
                f"DOUGONG_PLUGINS=-{hook.plugin_name}.",
                file=sys.stderr,
            )


def _print_version(wanted: bool) -> None:
    if wanted:
        from dougong import __version__

        print(__version__)
        raise typer.Exit


def _root(
    # Eager: it is answered before a command is asked for.
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what happens inside."),
) -> None:
    """dougong (斗拱): one LLM serving core for every accelerator."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 an error of dougong's, 2 wrong usage, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        build_app()()
    except DougongError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidRequestError) else 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): leave quietly, without a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
