"""``dougong doctor``: what is installed, what would be used, and why."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dougong.cli import options
from dougong.errors import DougongError

if TYPE_CHECKING:
    from dougong.hal import Backend, Choice

__all__ = ["doctor", "examine"]

_PACKAGES = ("dougong", "torch", "transformers", "tokenizers", "safetensors", "gguf", "pluggy", "triton")


def doctor(
    backend: options.Backend = None,
    dtype: Annotated[str, typer.Option(help="Data type to ask the kernels for.")] = "bfloat16",
    head_dim: Annotated[int, typer.Option(help="Head dimension to ask the kernels for.", min=1)] = 64,
    heads: Annotated[str, typer.Option(help="Query and kv heads to ask for, as H/K.")] = "9/3",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show plugins, backends, the kernel each op would run on, and why others were refused."""
    query_heads, kv_heads = options.query_and_kv_heads(heads)
    options.model_dtype(dtype)
    report = examine(backend, dtype, head_dim, query_heads, kv_heads)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(Console(), report)
    if report["errors"]:
        raise typer.Exit(1)


def examine(
    backend: str | None = None, dtype: str = "bfloat16", head_dim: int = 64, heads: int = 9, kv_heads: int = 3
) -> dict[str, Any]:
    """Everything that ``doctor`` shows, as plain values. Errors are collected, not raised."""
    from dougong.hal import find_backends, open_backend
    from dougong.hal.inventory import seen_accelerators
    from dougong.plugins import ABI, load_plugins

    errors: list[str] = []
    plugins = load_plugins(strict=False)
    errors += [str(plugin.error) for plugin in plugins.loaded if plugin.error is not None]
    report: dict[str, Any] = {
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "abi": list(ABI),
        "plugins": [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "state": "excluded" if plugin.skipped else "broken" if plugin.error else "loaded",
                "error": str(plugin.error) if plugin.error else "",
            }
            for plugin in plugins.loaded
        ],
        "backends": [],
        "chosen": None,
        "missing": [],
        "errors": errors,
    }
    try:
        backends = find_backends(plugins)
        report["backends"] = [
            {
                "name": one.spec.name,
                "plugin": one.plugin,
                "score": one.spec.score,
                "ok": one.probe.ok,
                "reason": one.probe.reason,
                "remedy": one.probe.remedy,
                "devices": list(one.probe.devices),
            }
            for one in backends
        ]
        names = {one.spec.name for one in backends}
        report["missing"] = [
            {"product": seen.product, "trace": seen.trace, "install": seen.install}
            for seen in seen_accelerators()
            if seen.backend not in names
        ]
        opened = open_backend(backend, plugins=plugins)
        report["chosen"] = _chosen(opened, dtype, head_dim, heads, kv_heads, errors)
    except DougongError as error:
        errors.append(str(error))
    except Exception as error:  # a driver that fails half-way is what this command is for
        errors.append(f"{type(error).__name__}: {error}")
    return report


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _chosen(
    backend: Backend, dtype: str, head_dim: int, heads: int, kv_heads: int, errors: list[str]
) -> dict[str, Any]:
    from dougong.hal import NHD, AttentionQuery, AttentionSpec, LinearQuery

    wanted = options.model_dtype(dtype)
    memory = backend.device.memory()
    layout = backend.layouts()[0]
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=wanted)
    ops: list[dict[str, Any]] = []

    def ask(label: str, choose: Any) -> None:
        try:
            ops.append(_op(label, choose()))
        except DougongError as error:
            errors.append(str(error))
            ops.append({"op": label, "provider": None, "refused": [], "error": str(error)})

    for one in [layout] if layout.name == NHD.name else [layout, NHD]:
        query = AttentionQuery(spec=spec, layout=one, block_size=one.default_block)
        ask(f"attention ({one.name}, block {one.default_block})", lambda query=query: backend.choose_attention(query))
    offered = {feature for one in backend.candidates.get("linear", ()) for feature in one.spec.features}
    for form in ("dense", "int8", "int4", *sorted(offered - {"int8", "int4"})):
        linear = LinearQuery(in_features=heads * head_dim, out_features=heads * head_dim, dtype=wanted, format=form)
        ask(f"linear ({form})", lambda linear=linear: backend.choose_linear(linear))
    try:
        ops += [_op(name, choice) for name, choice in backend.op_table(wanted, layout).choices.items()]
    except DougongError as error:
        errors.append(str(error))
    return {
        "backend": backend.name,
        "plugin": backend.plugin,
        "device": backend.device.name,
        "index": backend.device.index,
        "memory_free": memory.free,
        "memory_total": memory.total,
        "graphs": backend.device.graphs is not None,
        "collectives": backend.device.dist_backend,
        "facts": backend.device.facts(),
        "dtype": dtype,
        "ops": ops,
    }


def _op(label: str, choice: Choice) -> dict[str, Any]:
    return {
        "op": label,
        "provider": choice.spec.provider,
        "plugin": choice.candidate.plugin,
        "graph": choice.spec.graph,
        "refused": [
            {"provider": one.spec.provider, "plugin": one.plugin, "reason": why} for one, why in choice.refused
        ],
    }


def _show(console: Console, report: dict[str, Any]) -> None:
    versions = "  ".join(f"{name} {found}" for name, found in report["versions"].items())
    console.print(f"[bold]dougong doctor[/]  contract {'.'.join(map(str, report['abi']))}  Python {report['python']}")
    console.print(versions, style="dim", highlight=False)
    plugins = Table("plugin", "distribution", "version", "state", title="Plugins", title_justify="left")
    for one in report["plugins"]:
        colour = {"loaded": "green", "excluded": "yellow", "broken": "red"}[one["state"]]
        plugins.add_row(one["name"], one["distribution"], one["version"], f"[{colour}]{one['state']}[/]")
    console.print(plugins)
    backends = Table("backend", "plugin", "score", "here", "why", title="Backends, best first", title_justify="left")
    for one in report["backends"]:
        what = ", ".join(one["devices"]) or one["reason"]
        backends.add_row(
            one["name"], one["plugin"], str(one["score"]), "[green]yes[/]" if one["ok"] else "[red]no[/]",
            what if one["ok"] else f"{one['reason']}. {one['remedy']}".strip(),
        )  # fmt: skip
    console.print(backends)
    for seen in report["missing"]:
        what = f"[yellow]{seen['product']}[/] seems to be here ({seen['trace']})"
        console.print(f"{what} and no plugin serves it: {seen['install']}")
    chosen = report["chosen"]
    if chosen is not None:
        console.print(
            f"Chosen: [bold]{chosen['backend']}[/] ({chosen['device']}), {chosen['memory_free'] / 2**30:.1f} of "
            f"{chosen['memory_total'] / 2**30:.1f} GiB free, graphs {'yes' if chosen['graphs'] else 'no'}, "
            f"collectives {chosen['collectives']}"
        )
        for name, value in chosen["facts"].items():
            console.print(f"  {name}: {value}", style="dim", highlight=False)
        ops = Table("op", "runs on", "refused, and why", title=f"Ops in {chosen['dtype']}", title_justify="left")
        for one in chosen["ops"]:
            refused = "\n".join(f"{other['provider']}: {other['reason']}" for other in one["refused"])
            ops.add_row(one["op"], one["provider"] or f"[red]{one.get('error')}[/]", refused)
        console.print(ops)
    for error in report["errors"]:
        console.print("[bold red]error:[/] ", end="")
        console.print(error, markup=False, highlight=False)
