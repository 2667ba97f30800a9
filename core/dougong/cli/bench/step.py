"""``dougong bench step``: where the host's time goes in a steady decode step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dougong.cli import options
from dougong.cli.bench.offline import measure
from dougong.cli.bench.report import check_plot, emit, plot_bars

__all__ = ["step"]


def step(
    model: options.Model = "smollm2-135m",
    rows: Annotated[int, typer.Option(help="Requests that decode together.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Prompt tokens each.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="Output tokens each.", min=1)] = 64,
    backend: options.Backend = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    load_format: Annotated[str, typer.Option(help="dummy: random weights from a config alone.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the parts to this PNG.")] = None,
    set_: options.Set = None,
) -> None:
    """Microseconds per step on the engine's thread, by part: schedule, launch, wait for the device, commit."""
    from dougong.engine import LLM

    check_plot(plot)
    given = options.engine_options(
        set_, backend=backend, dtype=dtype, quantization=quantization, load_format=load_format, max_num_seqs=rows
    )
    given.setdefault("max_model_len", prompt + tokens)
    given.setdefault("skip_tokenizer_init", True)
    with LLM(model, **given) as llm:
        result = measure(llm, rows, prompt, tokens, shared=0, repeats=2, seed=0)
        runner = llm.engine.runner
        parts = result["host_us_per_step"]
        emit(
            "step",
            {"model": model, "rows": rows, "input_len": prompt, "output_len": tokens, "quantization": quantization},
            {"us_per_step": parts, "steps": result["steps"], "tpot_ms": result["tpot_ms"],
             "schedule_and_commit_us_per_row": round((parts["schedule"] + parts["commit"]) / rows, 3)},
            device={"backend": runner.backend.name, "name": runner.backend.device.name},
        )  # fmt: skip
    if plot is not None:
        plot_bars(plot, f"{model}: host time of a step with {rows} rows", "µs", parts)
