"""``dougong bench serve``: load on an OpenAI-compatible server, and what its users would see."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dougong.cli import options
from dougong.cli.bench.load import Answer, Target, run_load
from dougong.cli.bench.report import check_plot, emit
from dougong.cli.bench.server_process import engine_figures, served_model, server
from dougong.cli.bench.summary import parse_slo, plot_answers, summarize
from dougong.cli.bench.workload import Arrivals, Prompt, conversation_prompts, file_prompts, random_prompts
from dougong.cli.remote import base_url
from dougong.errors import EngineError

__all__ = ["serve"]


def serve(
    url: Annotated[str | None, typer.Option(help="Server to measure; without it one is started with --model.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Served name; without --url what to serve.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["DOUGONG_API_KEY", "OPENAI_API_KEY"], help="The server's key.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    dataset: Annotated[
        str, typer.Option(help="random, conversation (lengths like ShareGPT's), or a JSON(L) file.")
    ] = "random",
    num_prompts: Annotated[int, typer.Option("--num-prompts", "-n", min=1, help="Requests.")] = 100,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens (random).")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to answer with, where the data say nothing.")] = 128,
    length_spread: Annotated[float, typer.Option(min=0, max=1, help="Lengths from mean·(1 ± this) (random).")] = 0.0,
    shared_prefix_len: Annotated[int, typer.Option(min=0, help="First tokens that all prompts share (random).")] = 0,
    max_len: Annotated[int, typer.Option(min=8, help="Most tokens of a prompt and answer (conversation).")] = 2048,
    token_ids: Annotated[
        int | None, typer.Option("--token-ids", metavar="VOCABULARY", help="Send random ids below this, not words.")
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf sends all at once.")] = float("inf"),
    burstiness: Annotated[float, typer.Option(help="1 is Poisson, less is burstier, more is more even.")] = 1.0,
    burst: Annotated[int, typer.Option(help="Requests that come together each time.")] = 1,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Most open requests: a closed loop.")] = None,
    slo: Annotated[
        list[str] | None, typer.Option(help='Limits in ms for goodput, e.g. "ttft:200 tpot:50". Repeatable.')
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answer with just as many tokens as asked for.")] = True,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the measured ones.")] = 4,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds one request may take.")] = 600.0,
    body: Annotated[str | None, typer.Option("--body", metavar="JSON", help="More fields for each request.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distributions to this PNG.")] = None,
    details: Annotated[Path | None, typer.Option(help="Write one JSON line per request here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line, no table.")] = False,
    set_: options.Set = None,
) -> None:
    """Latency percentiles, throughput and goodput of a server under load.

    Times are the client's: what a user sees. Failed requests are counted and shown, never left out in silence.
    """
    check_plot(plot)
    limits = parse_slo(slo or [])
    arrivals = Arrivals(request_rate, burstiness, burst)
    extra = _object(body)
    if endpoint not in ("completions", "chat"):
        raise typer.BadParameter(f"--endpoint {endpoint!r}: expected completions or chat")
    prompts = _prompts(
        dataset, num_prompts, input_len, output_len, length_spread, shared_prefix_len, max_len, token_ids, seed
    )
    _raise_file_limit(min(num_prompts, max_concurrency or num_prompts) + 64)
    own = server(model or "smollm2-135m", _flags(set_)) if url is None else nullcontext(url)
    with own as address:
        base = base_url(address)
        name = model if url is not None and model else served_model(base, api_key)
        target = Target(base, name, endpoint, api_key, ignore_eos, extra, timeout)
        asyncio.run(run_load(target, prompts[:warmup], Arrivals()))
        before = engine_figures(base, api_key)
        answers, wall = _measure(target, prompts, arrivals, max_concurrency, seed, quiet=as_json)
        after = engine_figures(base, api_key)
    result = summarize(answers, wall, limits)
    if before is not None and after is not None:
        result["engine"] = after.since(before)
    workload = {
        "model": name, "endpoint": endpoint, "dataset": dataset, "num_prompts": num_prompts, "input_len": input_len,
        "output_len": output_len, "length_spread": length_spread, "shared_prefix_len": shared_prefix_len,
        "request_rate": "inf" if request_rate == float("inf") else request_rate, "burstiness": burstiness,
        "burst": burst, "max_concurrency": max_concurrency, "ignore_eos": ignore_eos, "seed": seed,
    }  # fmt: skip
    if not as_json:
        _show(Console(stderr=True), result)
    emit("serve", workload, result, device={"url": url or "own server"})
    if plot is not None:
        plot_answers(plot, f"{name}: {num_prompts} requests, {request_rate:g}/s", answers, limits)
    if details is not None:
        details.write_text("".join(json.dumps(_detail(answer, answers[0].sent)) + "\n" for answer in answers))
    if not result["completed"]:
        raise EngineError(f"none of {num_prompts} requests succeeded: {next(iter(result['errors']))}")


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise typer.BadParameter(f"--body: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("--body: expected a JSON object")
    return value


def _prompts(
    dataset: str, count: int, input_len: int, output_len: int, spread: float, shared: int, longest: int,
    vocabulary: int | None, seed: int,
) -> list[Prompt]:  # fmt: skip
    if dataset == "random":
        return random_prompts(
            count, input_len, output_len, spread=spread, shared_prefix=shared, vocab_size=vocabulary, seed=seed
        )
    if dataset in ("conversation", "sharegpt-like"):
        return conversation_prompts(count, longest=longest, vocab_size=vocabulary, seed=seed)
    return file_prompts(Path(dataset), count, output_len, seed)


def _flags(extra: list[str] | None) -> list[str]:
    """``--set max_num_seqs=8`` as the server's own ``--max-num-seqs 8``; booleans as ``--x`` and ``--no-x``."""
    flags: list[str] = []
    for name, value in options.engine_options(extra).items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def _raise_file_limit(wanted: int) -> None:
    """Each open request is a file here, and another in a server of our own, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


def _measure(
    target: Target, prompts: list[Prompt], arrivals: Arrivals, max_concurrency: int | None, seed: int, *, quiet: bool
) -> tuple[list[Answer], float]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, disable=quiet, refresh_per_second=4
    ) as bar:
        task = bar.add_task("requests", total=len(prompts))
        return asyncio.run(
            run_load(
                target, prompts, arrivals, max_concurrency=max_concurrency, seed=seed,
                on_done=lambda answer: bar.advance(task),
            )
        )  # fmt: skip


def _detail(answer: Answer, start: float) -> dict[str, Any]:
    return {
        "sent_s": round(answer.sent - start, 6),
        "ttft_s": round(answer.ttft, 6) if answer.pieces else None,
        "itl_s": [round(gap, 6) for gap in answer.itl],
        "e2e_s": round(answer.e2e, 6),
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "error": answer.error or None,
    }


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table("ms", "mean", "p50", "p90", "p95", "p99", "max", box=None, pad_edge=False, header_style="bold")
    for label, name in (
        ("time to first token", "ttft_ms"),
        ("time per token after it", "tpot_ms"),
        ("between pieces", "itl_ms"),
        ("whole request", "e2e_ms"),
    ):
        spread = result[name]
        if spread:
            table.add_row(label, *(f"{spread[one]:.1f}" for one in ("mean", "p50", "p90", "p95", "p99", "max")))
    console.print(table)
    line = (
        f"{result['completed']} done, {result['failed']} failed in {result['wall_s']:.1f} s · "
        f"{result['requests_per_s']:.2f} requests/s · {result['output_tok_s']:.0f} output tokens/s · "
        f"at most {result['peak_concurrency']} at once"
    )
    if "goodput_share" in result:
        line += f" · goodput {result['goodput_requests_per_s']:.2f} requests/s ({100 * result['goodput_share']:.0f}%)"
    console.print(line, highlight=False)
    for error, count in result.get("errors", {}).items():
        console.print(f"{count} × {error}", style="red", markup=False, highlight=False)
