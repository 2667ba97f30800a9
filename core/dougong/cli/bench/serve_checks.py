"""``dougong bench serve-checks``: two promises of the server, measured.

streams    1,000 open streams cost a step of the engine no more processor time than 8 do
overhead   64 streams through HTTP take hardly longer than the same batch through the offline engine
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from dougong.cli import options
from dougong.cli.bench.load import Target, run_load
from dougong.cli.bench.report import emit
from dougong.cli.bench.serve import _flags, _raise_file_limit
from dougong.cli.bench.server_process import engine_figures, served_model, server
from dougong.cli.bench.summary import summarize
from dougong.cli.bench.workload import Arrivals, random_prompts
from dougong.cli.remote import base_url
from dougong.errors import EngineError

__all__ = ["serve_checks"]

#: What issue 6 allows: a tenth.
ALLOWED = 1.10
#: Rounds of 8 streams in a run of few.
_ROUNDS = 24


def serve_checks(
    model: options.Model = "smollm2-135m",
    check: Annotated[str, typer.Option(help="streams, overhead or both.")] = "both",
    streams: Annotated[int, typer.Option(min=9, help="Open streams beside which 8 are measured.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Streams whose time is compared with the offline engine.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens each.")] = 32,
    output_len: Annotated[int, typer.Option(min=2, help="Output tokens each.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the medians are compared.")] = 3,
    vocab_size: Annotated[int, typer.Option(help="Random token ids stay below this.")] = 2000,
    set_: options.Set = None,
) -> None:
    """Measure the engine's cost per step under many streams, and the server's over the offline engine."""
    if check not in ("streams", "overhead", "both"):
        raise typer.BadParameter(f"--check {check!r}: expected streams, overhead or both")
    flags = _flags(set_)
    if check in ("streams", "both"):
        result = _streams(model, flags, streams, input_len, output_len, repeats, vocab_size)
        emit("serve-streams", {"model": model, "streams": streams, "max_num_seqs": 8, "input_len": input_len,
             "output_len": output_len, "repeats": repeats}, result, device={"url": "own server"})  # fmt: skip
    if check in ("overhead", "both"):
        result = _overhead(model, set_ or [], flags, batch, input_len, output_len, repeats, vocab_size)
        emit("serve-overhead", {"model": model, "streams": batch, "input_len": input_len, "output_len": output_len,
             "repeats": repeats}, result, device={"url": "own server"})  # fmt: skip


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _streams(
    model: str, flags: list[str], streams: int, input_len: int, output_len: int, repeats: int, vocab_size: int
) -> dict[str, Any]:
    """An engine that runs 8 at a time, under rounds of 8 streams and under all streams at once.

    Both keep 8 rows busy and mix prompts and tokens alike, so that a step's work is the same; what differs is how many
    streams are open beside it.
    """
    _raise_file_limit(2 * streams + 64)
    found: dict[str, list[Any]] = {"few": [], "many": []}
    with server(model, [*flags, "--max-num-seqs", "8", "--max-queue", str(streams)]) as address:
        target = Target(base_url(address), served_model(base_url(address), None))

        def run(count: int, at_once: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
            prompts = random_prompts(count, input_len, output_len, vocab_size=vocab_size, seed=seed)
            before = engine_figures(target.url)
            answers, wall = [], 0.0
            for start in range(0, count, at_once):
                some, took = asyncio.run(run_load(target, prompts[start : start + at_once], Arrivals()))
                answers += some
                wall += took
            after = engine_figures(target.url)
            engine = after.since(before) if before is not None and after is not None else None
            summary = summarize(answers, wall, {})
            if summary["failed"] or engine is None:
                raise EngineError(f"{summary['failed']} of {count} streams failed: {summary.get('errors')}")
            return engine, summary

        run(32, 32, 1)
        for repeat in range(repeats):  # in turn, so that a machine that grows slower or faster favours neither
            found["few"].append(run(min(streams, 8 * _ROUNDS), 8, 2 * repeat + 100))
            found["many"].append(run(streams, streams, 2 * repeat + 101))
    cpu = {name: _median([engine["cpu_us_per_step"] for engine, _ in runs]) for name, runs in found.items()}
    ratio = cpu["many"] / cpu["few"]
    return {
        "cpu_us_per_step": {"streams_8": cpu["few"], f"streams_{streams}": cpu["many"]},
        "ratio": round(ratio, 4),
        "allowed": ALLOWED,
        "within": ratio <= ALLOWED,
        "output_tok_s": {name: _median([one["output_tok_s"] for _, one in runs]) for name, runs in found.items()},
        "peak_concurrency": {name: max(one["peak_concurrency"] for _, one in runs) for name, runs in found.items()},
        "runs": {name: [engine for engine, _ in runs] for name, runs in found.items()},
    }


def _overhead(
    model: str, extra: list[str], flags: list[str], batch: int, input_len: int, output_len: int, repeats: int,
    vocab_size: int,
) -> dict[str, Any]:  # fmt: skip
    """The offline engine runs in a process of its own before the server starts, so that neither shares the cores."""
    command = [
        sys.executable, "-m", "dougong", "bench", "offline", "--model", model, "--workloads",
        f"{batch}:{input_len}:{output_len}", "--repeats", str(repeats), "--max-num-seqs", str(batch),
    ]  # fmt: skip
    for item in extra:
        command += ["--set", item]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"`dougong bench offline` failed:\n{done.stderr[-2000:]}")
    offline = json.loads(done.stdout.splitlines()[-1])["result"]
    walls: list[float] = []
    engines = []
    with server(model, [*flags, "--max-num-seqs", str(batch), "--no-enable-prefix-caching"]) as address:
        target = Target(base_url(address), served_model(base_url(address), None))
        for repeat in range(-1, repeats):
            prompts = random_prompts(batch, input_len, output_len, vocab_size=vocab_size, seed=repeat + 100)
            before = engine_figures(target.url)
            answers, wall = asyncio.run(run_load(target, prompts, Arrivals()))
            after = engine_figures(target.url)
            failed = [answer.error for answer in answers if answer.error]
            if failed:
                raise EngineError(f"{len(failed)} of {batch} streams failed: {failed[0]}")
            if repeat >= 0 and before is not None and after is not None:
                walls.append(wall)
                engines.append(after.since(before))
    served, alone = _median(walls), _median(offline["wall_s_all"])
    ratio = served / alone
    return {
        "wall_s": {"offline": round(alone, 4), "served": round(served, 4)},
        "wall_s_all": {"offline": offline["wall_s_all"], "served": [round(wall, 4) for wall in walls]},
        "output_tok_s": {
            "offline": round(batch * output_len / alone, 1),
            "served": round(batch * output_len / served, 1),
        },
        "ratio": round(ratio, 4),
        "allowed": ALLOWED,
        "within": ratio <= ALLOWED,
        "engine": engines,
    }
