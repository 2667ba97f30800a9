"""The suite's hook into the ``dougong`` command: ``dougong compat`` and ``dougong new-backend``. Import-light."""

from __future__ import annotations

from typing import Any

from dougong.plugins import hookimpl

__all__ = ["dougong_cli"]


@hookimpl
def dougong_cli(app: Any) -> None:
    from dougong_compat.commands.app import build_app
    from dougong_compat.commands.new_backend import new_backend

    app.add_typer(build_app(), name="compat")
    app.command("new-backend")(new_backend)
