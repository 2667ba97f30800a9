"""``dougong bench offline``: requests of fixed lengths through the engine, random token ids, greedy."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from dougong.cli import options
from dougong.cli.bench.report import check_plot, emit, plot_bars
from dougong.types import RequestOutput, SamplingParams

__all__ = ["measure", "offline"]


def offline(
    model: options.Model = "smollm2-135m",
    workloads: Annotated[
        str, typer.Option(help="N:IN:OUT[,N:IN:OUT…]: requests, prompt and output tokens each.")
    ] = "1:128:128",
    backend: options.Backend = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    load_format: Annotated[str, typer.Option(help="dummy: random weights from a config alone.")] = "auto",
    shared_prefix_len: Annotated[int, typer.Option(help="First tokens that all prompts share.", min=0)] = 0,
    prefix_caching: Annotated[bool, typer.Option(help="Keep and reuse prompts' KV.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed runs; the best is the headline, all are reported.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    max_num_seqs: options.MaxSeqs = 256,
    max_num_batched_tokens: options.MaxTokensPerStep = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rates to this PNG.")] = None,
    set_: options.Set = None,
) -> None:
    """Output tokens per second of whole batches, as a peer's offline benchmark measures them."""
    from dougong.engine import LLM

    check_plot(plot)
    loads = options.numbers("--workloads", "N:IN:OUT", workloads, "16:512:128")
    if not loads:
        raise typer.BadParameter("--workloads is empty: expected N:IN:OUT[,N:IN:OUT…], e.g. 16:512:128")
    given = options.engine_options(
        set_, backend=backend, dtype=dtype, quantization=quantization, load_format=load_format,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
    )  # fmt: skip
    given.setdefault("max_model_len", max(prompt + new for _, prompt, new in loads))
    given.setdefault("skip_tokenizer_init", True)
    given["enable_prefix_caching"] = prefix_caching
    started = perf_counter()
    bars: dict[str, float] = {}
    with LLM(model, **given) as llm:
        load_s = perf_counter() - started
        runner = llm.engine.runner
        for index, load in enumerate(loads):
            count, prompt, new = load
            result = measure(
                llm, count, prompt, new, shared=shared_prefix_len, repeats=repeats, seed=seed + 1000 * index
            )
            result["load_s"] = round(load_s, 3)
            workload = {
                "model": model, "num_prompts": count, "input_len": prompt, "output_len": new,
                "dtype": str(runner.model_config.dtype), "quantization": quantization,
                "prefix_caching": prefix_caching, "shared_prefix_len": shared_prefix_len,
            }  # fmt: skip
            emit(
                "offline", workload, result, device={"backend": runner.backend.name, "name": runner.backend.device.name}
            )
            bars[f"{count} × {prompt} → {new}"] = result["output_tok_s"]
    if plot is not None:
        plot_bars(plot, f"{model}, output tokens per second", "tokens/s", bars)


def measure(llm: Any, count: int, prompt: int, new: int, *, shared: int, repeats: int, seed: int) -> dict[str, Any]:
    """Run ``count`` prompts of ``prompt`` random tokens to ``new`` output tokens each, ``repeats`` times."""
    _once(llm, min(count, 64), prompt, min(new, 8), shared, 10_000 + seed)
    runs = [_once(llm, count, prompt, new, shared, seed + repeat + 1) for repeat in range(repeats)]
    best = min(runs, key=lambda run: run["wall_s"])
    return {
        **best,
        "wall_s_all": [run["wall_s"] for run in runs],
        "output_tok_s": round(count * new / best["wall_s"], 1),
        "total_tok_s": round(count * (prompt + new) / best["wall_s"], 1),
    }


def _once(llm: Any, count: int, prompt: int, new: int, shared: int, seed: int) -> dict[str, Any]:
    engine = llm.engine
    top = max(engine.runner.model_config.vocab_size - 1000, 64)  # keep clear of special ids
    common = random.Random(12345)
    prefix = [common.randrange(10, top) for _ in range(min(shared, prompt))]
    draw = random.Random(seed)
    prompts = [prefix + [draw.randrange(10, top) for _ in range(prompt - len(prefix))] for _ in range(count)]
    sampling = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    engine.reset_prefix_cache()
    before = engine.stats.to_dict()
    started = perf_counter()
    outputs: list[RequestOutput] = llm.generate(prompts, sampling, use_tqdm=False)
    wall = perf_counter() - started
    after = engine.stats.to_dict()
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert made == count * new, (made, count, new)
    first: list[float] = []
    per_token: list[float] = []
    for output in outputs:
        times = output.times
        assert times.arrival is not None and times.first_token is not None and times.last_token is not None
        first.append(times.first_token - times.arrival)
        if new > 1:
            per_token.append((times.last_token - times.first_token) / (new - 1))
    first.sort()
    per_token.sort()
    steps = after["steps"] - before["steps"]
    return {
        "wall_s": round(wall, 4),
        "ttft_ms": _spread(first),
        "tpot_ms": _spread(per_token),
        "cached_prompt_tokens": after["cached_tokens"] - before["cached_tokens"],
        "steps": steps,
        "host_us_per_step": {
            part: round(1e6 * (after[f"{part}_s"] - before[f"{part}_s"]) / max(1, steps), 1)
            for part in ("schedule", "launch", "wait", "commit")
        },
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": round(statistics.fmean(values) * 1e3, 3),
        "p50": round(values[len(values) // 2] * 1e3, 3),
        "p99": round(values[min(len(values) - 1, int(len(values) * 0.99))] * 1e3, 3),
    }
