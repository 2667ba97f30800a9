"""``dougong bench perplexity``: what a quantization costs in quality, on a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from dougong.cli import options
from dougong.cli.bench.report import emit
from dougong.errors import InvalidRequestError
from dougong.types import SamplingParams

__all__ = ["perplexity"]


def perplexity(
    text: Annotated[
        list[Path], typer.Option(help="UTF-8 file to predict; repeat for more.", exists=True, dir_okay=False)
    ],
    model: options.Model = "smollm2-135m",
    quantizations: Annotated[
        str, typer.Option(help="Formats to compare, separated by commas; 'none' is the model's own dtype.")
    ] = "none,int8,int4",
    window: Annotated[int, typer.Option(help="Tokens per prompt; each but the first is predicted.", min=2)] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the text's first tokens.")] = None,
    backend: options.Backend = None,
    dtype: options.Dtype = "auto",
    set_: options.Set = None,
) -> None:
    """exp(mean negative log-likelihood) of a text, cut into windows without overlap; one line per format.

    ``ratio`` is to the first format of the list, measured in the same run.
    """
    from dougong.engine import LLM

    given = options.engine_options(set_, backend=backend, dtype=dtype, max_model_len=window + 1)
    given["enable_prefix_caching"] = False  # a cached position has no logits
    first: float | None = None
    for name in (part.strip() for part in quantizations.split(",")):
        with LLM(model, quantization=None if name == "none" else name, **given) as llm:
            windows = _windows(llm.get_tokenizer(), text, window, max_tokens)
            mean, count = _mean_loss(llm, windows)
            runner = llm.engine.runner
            value = math.exp(mean)
            first = first if first is not None else value
            emit(
                "perplexity",
                {"model": model, "texts": [path.name for path in text], "window": window, "quantization": name,
                 "dtype": str(runner.model_config.dtype)},
                {"perplexity": round(value, 4), "ratio": round(value / first, 5), "tokens": count},
                device={"backend": runner.backend.name, "name": runner.backend.device.name},
            )  # fmt: skip


def _windows(tokenizer: Any, paths: list[Path], window: int, most: int | None) -> list[list[int]]:
    ids: list[int] = []
    for path in paths:
        ids += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = ids[:most]
    windows = [ids[at : at + window] for at in range(0, len(ids), window)]
    if windows and len(windows[-1]) < 2:  # one token alone predicts nothing
        windows.pop()
    if not windows:
        raise InvalidRequestError(f"--text has {len(ids)} tokens; at least 2 are needed.")
    return windows


def _mean_loss(llm: Any, windows: list[list[int]]) -> tuple[float, int]:
    """Mean negative log-likelihood per predicted token, in nats, and how many were predicted."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    losses: list[float] = []
    for ids, output in zip(windows, llm.generate(windows, sampling, use_tqdm=False), strict=True):
        losses += [-entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    return math.fsum(losses) / len(losses), len(losses)
