"""The Typer application of ``dougong compat``. Exit codes: 0 conformant or done, 1 failed, 2 invalid, 3 usage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
import typer
from rich.console import Console

from dougong_compat.commands import inspect, prove, run
from dougong_compat.manifest import ManifestError
from dougong_compat.target import OpenError

__all__ = ["build_app", "main"]

USAGE = 3


def _usage_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the user's become one line and exit code 3."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (OpenError, ManifestError, FileNotFoundError, ValueError) as error:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
            print(error, file=sys.stderr)
            raise typer.Exit(USAGE) from error

    return wrapped


def build_app() -> typer.Typer:
    """The application; ``dougong`` mounts it as ``compat``."""
    app = typer.Typer(
        name="compat", help="Prove that a backend means what the contract says.", no_args_is_help=True,
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    for function in (
        run.run,
        run.repro,
        run.fuzz,
        run.perf,
        inspect.support,
        inspect.list_cases,
        inspect.report,
        inspect.diff_reports,
        inspect.verify,
        prove.selftest,
    ):
        name = {"list_cases": "list", "diff_reports": "diff"}.get(function.__name__, function.__name__)
        app.command(name)(_usage_errors(function))
    return app


def main() -> None:
    """``python -m dougong_compat``."""
    try:
        command = typer.main.get_command(build_app())
        code = command.main(prog_name="dougong compat", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
