"""``dougong serve`` and ``dougong keys``."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.server.config import ENGINE_ONLY, OptionType, ServerConfig, option_types, resolve_config
from dougong.server.other_names import OTHER_NAMES, SHORT_FLAGS, OtherName, flag_of

__all__ = ["keys_app", "serve_command"]

_NEEDED = ("fastapi", "uvicorn", "zmq", "msgspec", "yaml", "prometheus_client")


def serve_command() -> Callable[..., None]:
    """The command, with one option for each of the server's and of the engine's."""
    docs = _docs(ServerConfig) | _docs(EngineConfig)
    engine = {one.name for one in fields(EngineConfig)} - ENGINE_ONLY
    types = option_types()
    parameters = [
        _parameter("model", str | None, typer.Argument(help=docs["model"], show_default="smollm2-135m")),
        _parameter(
            "config",
            Path | None,
            typer.Option("--config", "-c", help="YAML file with options: a mapping of their names to values."),
        ),
    ]
    for name, kind in types.items():
        if name != "model":
            panel = "Engine" if name in engine else "Server"
            parameters.append(_option(name, kind, docs.get(name, ""), panel))
    parameters += [_hidden(name, other, types) for name, other in OTHER_NAMES.items()]
    parameters.append(_parameter("model_option", str | None, typer.Option("--model", hidden=True)))

    def serve(**given: Any) -> None:
        """Serve MODEL over HTTP: OpenAI's API, Anthropic's messages and Ollama's chat, with a page at /.

        Every option can also be set in the YAML file of --config, or by an environment variable: DOUGONG_PORT for
        --port. The command line goes before the environment, and that before the file. vLLM's names of options are
        understood where the meaning is equal.
        """
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'dougong[serve]'.")
        file, again = given.pop("config"), given.pop("model_option")
        if again is not None and given["model"] is not None:
            raise ConfigError(f"MODEL {given['model']!r} and --model {again!r}: give one of them.")
        given["model"] = given["model"] or again
        # A list that was not given is no empty list.
        config = resolve_config({k: v for k, v in given.items() if v is not None and v != []}, file=file)
        from dougong.server.run import serve as run

        run(config)

    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return serve


def _parameter(name: str, kind: Any, how: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, how])


def _option(name: str, kind: OptionType, text: str, panel: str) -> inspect.Parameter:
    flag = flag_of(name)
    names = [f"{flag}/--no-{flag[2:]}"] if kind.kind is bool else [flag]
    if name in SHORT_FLAGS:
        names.append(SHORT_FLAGS[name])
    if kind.default not in (None, "", (), {}):
        shown = ", ".join(map(str, kind.default)) if kind.kind is tuple else str(kind.default)
        text = f"{text} (default: {shown})"
    metavar = "JSON" if kind.kind is dict else None
    hint: Any = GenericAlias(list, kind.item) if kind.kind is tuple else str if kind.kind is dict else kind.kind
    how = typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, metavar=metavar)
    return _parameter(name, hint | None, how)


def _hidden(name: str, other: OtherName, types: Mapping[str, OptionType]) -> inspect.Parameter:
    """One of vLLM's names: `resolve_config` says what it means. Help does not show it, the handbook does."""
    flag = flag_of(name)
    names = [f"{flag}/--no-{flag[2:]}"] if other.switch else [flag]
    many = other.ours is not None and types[other.ours].kind is tuple
    hint: Any = bool if other.switch else GenericAlias(list, str) if many else str
    return _parameter(name, hint | None, typer.Option(*names, hidden=True, show_default=False))


def _docs(cls: type) -> dict[str, str]:
    """The docstring below each field, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:]):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[before.target.id] = " ".join(str(after.value.value).replace("``", "").split())
    return found


keys_app = typer.Typer(
    name="keys",
    help="API keys of a server: made, listed, removed. The file holds their hashes only.",
    no_args_is_help=True,
)
_File = Annotated[Path, typer.Option("--file", "-f", envvar="DOUGONG_API_KEYS_FILE", help="The key file.")]
_DEFAULT = Path("dougong-keys.json")


@keys_app.command()
def add(
    name: Annotated[str, typer.Argument(help="Whom it is for.")],
    file: _File = _DEFAULT,
    requests_per_minute: Annotated[int | None, typer.Option(help="In place of the server's limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="In place of the server's limit.")] = None,
) -> None:
    """Make a key and print it. It cannot be shown again."""
    from dougong.server.keys import KeyFile

    print(KeyFile(file).add(name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute))


@keys_app.command("list")
def list_(file: _File = _DEFAULT) -> None:
    """Show the names of the keys, and their limits."""
    from dougong.server.keys import KeyFile

    table = Table("name", "made", "requests/min", "tokens/min")
    for key in KeyFile(file).read():
        limits = [str(value) if value else "" for value in (key.requests_per_minute, key.tokens_per_minute)]
        table.add_row(key.name, key.created, *limits)
    Console().print(table)


@keys_app.command()
def remove(name: Annotated[str, typer.Argument(help="Whose key.")], file: _File = _DEFAULT) -> None:
    """Take a key back. A running server notices within a second."""
    from dougong.server.keys import KeyFile

    KeyFile(file).remove(name)
