"""Commands that plugins add: one plugin's failure is named and takes no other command away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dougong.cli.app import _add_plugin_commands
from dougong.plugins import hookimpl, load_plugins


@hookimpl
def _broken(app: Any) -> None:
    raise ImportError("no module named half_installed")


@hookimpl
def _good(app: Any) -> None:
    app.command("greet")(lambda: print("good day"))
    app.command("leave")(lambda: print("good bye"))


def test_a_plugin_whose_commands_fail_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    extra = [("good", SimpleNamespace(dougong_cli=_good)), ("broken", SimpleNamespace(dougong_cli=_broken))]
    app = typer.Typer()
    _add_plugin_commands(app, load_plugins(entries=[], extra=extra))
    told = capsys.readouterr().err
    assert "'broken'" in told
    assert "ImportError: no module named half_installed" in told
    assert "DOUGONG_PLUGINS=-broken" in told
    assert "'good'" not in told
    assert CliRunner().invoke(app, ["greet"]).output == "good day\n"
