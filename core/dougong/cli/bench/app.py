"""The bench commands, gathered."""

from __future__ import annotations

import typer

from dougong.cli.bench.attention import attention
from dougong.cli.bench.kv import kv
from dougong.cli.bench.offline import offline
from dougong.cli.bench.perplexity import perplexity
from dougong.cli.bench.serve import serve
from dougong.cli.bench.serve_checks import serve_checks
from dougong.cli.bench.step import step

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Measure: every command prints one JSON line with device, versions, workload and result.", no_args_is_help=True
)
bench_app.command()(attention)
bench_app.command()(kv)
bench_app.command()(offline)
bench_app.command()(perplexity)
bench_app.command()(serve)
bench_app.command("serve-checks")(serve_checks)
bench_app.command()(step)
