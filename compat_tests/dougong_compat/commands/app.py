"""The Typer application of ``dougong compat``. Exit codes: 0 conformant or done, 1 failed, 2 invalid, 3 usage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dougong_compat.commands import inspect, prove, run
from dougong_compat.manifest import ManifestError
from dougong_compat.target import OpenError

__all__ = ["build_app", "main"]

USAGE = 3


@contextmanager
def _leaving_with_3() -> Iterator[None]:
    """Wrong options leave with 2 as a rule; here 2 says that a run proves nothing."""
    try:
        yield
    except Exception as error:
        if getattr(error, "exit_code", None) == 2 and hasattr(error, "format_message"):
            error.exit_code = USAGE  # type: ignore[attr-defined]
        raise


class _Commands(TyperGroup):
    """The suite's commands, under ``dougong`` or alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _leaving_with_3():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _leaving_with_3():
            return super().invoke(ctx)


def _usage_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the user's become one line and exit code 3."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            raise
        except (OpenError, ManifestError, OSError, ValueError) as error:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
            print(error, file=sys.stderr)
            raise typer.Exit(USAGE) from error

    return wrapped


def build_app() -> typer.Typer:
    """The application; ``dougong`` mounts it as ``compat``."""
    app = typer.Typer(
        name="compat", cls=_Commands, help="Prove that a backend means what the contract says.", no_args_is_help=True,
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
    build_app()(prog_name="dougong compat")
