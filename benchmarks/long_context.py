#!/usr/bin/env python3
"""One very long sequence beside many short ones: does the backend's attention give the torch reference's tokens?

The model is the first layers of a given config with random weights. The reference runs every request alone; the
backend's kernels then run all of them together, the long one first, so that it decodes beside the others' prompts and
decodes. Both are fed the reference's tokens, so that one near tie does not part everything behind it. float32: every
token equal. bfloat16 and float16: the reference's logit of the token chosen within 4 ulp of its best one.

    python benchmarks/long_context.py CONFIG_DIR
    python benchmarks/long_context.py CONFIG_DIR --backend cpu --layers 2 --lengths 300,20,40 --tokens 4

Prints a JSON line per dtype as soon as it is known; exit status 1 if a token was wrong. What takes memory are the
reference's scores: query heads x --reference-step-tokens x the longest length in float32, about four times over.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dougong.cli.bench.report import emit
from dougong.engine import LLM
from dougong.errors import ConfigError, EngineError
from dougong.types import SamplingParams

LONG = 131_000
SHORT = tuple(range(20, 400, 12))
DTYPES = ("bfloat16", "float32", "float16")

#: (request, step): one sampled token.
Place = tuple[int, int]


@dataclass
class Witness:
    """Stands in an engine's sampler: keeps the logits of every token, and may put other tokens in the sampler's place.

    Args:
        llm: the engine, all options of whose requests are greedy.
        lengths: the prompts'. They lie at least ``tokens`` apart, so that a position tells the request.
        forced: the tokens to go on with, whatever is sampled; None keeps what is sampled.
    """

    llm: LLM
    lengths: Sequence[int]
    tokens: int
    forced: dict[Place, int] | None = None
    logits: dict[Place, torch.Tensor] = field(default_factory=dict)
    """[V] on the host, in the model's dtype."""
    company: int = 0
    """The most rows that were sampled beside request 0."""

    def __post_init__(self) -> None:
        self._places = {n + step: (row, step) for row, n in enumerate(self.lengths) for step in range(self.tokens)}
        self._sampler = self.llm.engine.runner._parts.sampler
        self._plain = self._sampler.sample
        self._sampler.sample = self._sample  # type: ignore[method-assign]

    def _sample(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, host_slots: Any, host_positions: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        # With overlap the engine launches a step before it knows that a request's last token came: no place is its.
        places = [self._places.get(position) for position in host_positions.tolist()]
        if any(place is not None and place[0] == 0 for place in places):
            self.company = max(self.company, len(places) - 1)
        for place, row in zip(places, logits.cpu()):
            if place is not None:
                self.logits[place] = row.clone()
        sampled = self._plain(logits, slots, positions, host_slots, host_positions, **more)
        if self.forced is not None:
            own = sampled.tokens.tolist()
            told = [token if place is None else self.forced[place] for place, token in zip(places, own)]
            sampled.tokens.copy_(torch.tensor(told))
            self._sampler._last_token.index_copy_(0, slots, sampled.tokens)
        return sampled


@dataclass
class Run:
    """What one engine gave: tokens [request][step], logits by place, and how it went."""

    tokens: list[list[int]]
    logits: dict[Place, torch.Tensor]
    company: int
    seconds: float
    provider: str
    device: dict[str, str]
    peak: int | None
    """Bytes of the device's memory at most; None where nothing meters them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="folder with a model's config.json")
    parser.add_argument("--layers", type=int, default=2, help="of the config's layers, take the first (default 2)")
    parser.add_argument("--lengths", type=_lengths, default=(LONG, *SHORT), help="prompt tokens: long one first, N,N,…")
    parser.add_argument("--tokens", type=int, default=12, help="output tokens of each request (default 12)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--backend", help="default: the best one here")
    parser.add_argument("--provider", help="attention provider to judge (default: the backend's choice)")
    parser.add_argument("--step-tokens", type=int, default=2048, help="max_num_batched_tokens of the kernels' engine")
    parser.add_argument(
        "--reference-step-tokens", type=int, default=256, help="the reference's; its scores take memory"
    )
    a = parser.parse_args(arguments)
    wrong = [name for name in a.dtypes.split(",") if name not in DTYPES]
    if wrong:
        parser.error(f"--dtypes {a.dtypes}: {wrong[0]!r} is none of {', '.join(DTYPES)}")
    for name in ("layers", "tokens", "step_tokens", "reference_step_tokens"):
        if getattr(a, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(a, name)}: at least 1")
    ordered = sorted(a.lengths)
    for one, other in pairwise(ordered):
        if other - one < a.tokens:
            parser.error(
                f"--lengths holds {one} and {other}: lengths must lie at least --tokens ({a.tokens}) apart, since a "
                "token's position tells whose it is"
            )
    if not (a.config / "config.json").is_file():
        parser.error(f"{a.config} holds no config.json: give the folder of a model")
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        a.layers, vocabulary = _shrink(a.config, Path(folder), a.layers, max(a.lengths) + a.tokens)
        draw = random.Random(3)
        prompts = [[draw.randrange(10, vocabulary) for _ in range(length)] for length in a.lengths]
        for dtype in a.dtypes.split(","):
            equal &= _compare(a, folder, prompts, dtype)
    return 0 if equal else 1


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if len(lengths) < 2 or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two or more token counts, e.g. 131000,20,300")
    return lengths


def _shrink(config: Path, folder: Path, layers: int, length: int) -> tuple[int, int]:
    """Write the config with fewer layers and room for ``length`` tokens; returns its layers and its vocabulary's size.

    Raises:
        ConfigError: it is not a plain decoder's.
    """
    values: dict[str, Any] = json.loads((config / "config.json").read_text(encoding="utf-8"))
    needed = ("num_hidden_layers", "max_position_embeddings", "vocab_size", "num_attention_heads", "hidden_size")
    lacking = [name for name in needed if name not in values]
    if lacking:
        raise ConfigError(f"{config / 'config.json'} has no {', '.join(lacking)}: give the folder of a plain decoder")
    values["num_hidden_layers"] = min(layers, values["num_hidden_layers"])
    values["max_position_embeddings"] = max(length, values["max_position_embeddings"])
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return values["num_hidden_layers"], values["vocab_size"]


def _compare(a: argparse.Namespace, folder: str, prompts: list[list[int]], dtype: str) -> bool:
    """Run both engines, print the line, and say whether every token is right."""
    reference = _run(
        a, folder, prompts, dtype, None, attention_provider="torch reference", enforce_eager=True, max_num_seqs=1,
        max_num_batched_tokens=a.reference_step_tokens,
    )  # fmt: skip
    forced = {(row, step): token for row, row_of in enumerate(reference.tokens) for step, token in enumerate(row_of)}
    ours = _run(
        a, folder, prompts, dtype, forced, attention_provider=a.provider, max_num_seqs=len(prompts),
        max_num_batched_tokens=a.step_tokens,
    )  # fmt: skip
    result = judge(reference.logits, ours.logits, getattr(torch, dtype))
    emit(
        "long_context",
        {"model": str(a.config), "layers": a.layers, "dtype": dtype, "lengths": list(a.lengths), "tokens": a.tokens},
        {
            **result,
            "provider": ours.provider,
            "rows_beside_the_long_one": ours.company,
            "seconds": {"reference": reference.seconds, "kernels": ours.seconds},
            "peak_memory_GB": {
                name: None if run.peak is None else round(run.peak / 1e9, 2)
                for name, run in (("reference", reference), ("kernels", ours))
            },
        },
        device=ours.device,
    )
    return bool(result["right"])


def _run(
    a: argparse.Namespace,
    folder: str,
    prompts: list[list[int]],
    dtype: str,
    forced: dict[Place, int] | None,
    **options: Any,
) -> Run:
    """All requests through one engine, greedily, with a cache of just the size they need."""
    started = perf_counter()
    longest, held = max(a.lengths), sum(a.lengths) if options["max_num_seqs"] > 1 else max(a.lengths)
    sampling = SamplingParams(temperature=0.0, max_tokens=a.tokens, ignore_eos=True, detokenize=False)
    # Beside the tokens: a begun block each, and scratch blocks for the padding of graphs.
    room = held + len(prompts) * (a.tokens + 64) + 2048
    with LLM(
        folder, backend=a.backend, dtype=dtype, load_format="dummy", skip_tokenizer_init=True,
        max_model_len=longest + a.tokens, enable_prefix_caching=False, kv_cache_memory=room * _bytes(folder, dtype),
        **options,
    ) as llm:  # fmt: skip
        runner = llm.engine.runner
        module, metered = runner.backend.device.module, _metered(runner.backend.device)
        if metered:
            module.reset_peak_memory_stats()
        witness = Witness(llm, a.lengths, a.tokens, forced)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        failed = [output.outputs[0].error for output in outputs if output.outputs[0].error]
        if failed:
            raise EngineError(f"{len(failed)} of {len(outputs)} requests failed, the first with: {failed[0]}")
        providers = {c.spec.provider for name, c in runner.choices.items() if name.startswith("attention")}
        return Run(
            [list(output.outputs[0].token_ids) for output in outputs],
            witness.logits,
            witness.company,
            round(perf_counter() - started, 1),
            ", ".join(sorted(providers)),
            {"backend": runner.backend.name, "name": runner.backend.device.name},
            int(module.max_memory_allocated()) if metered else None,
        )


def _metered(device: Any) -> bool:
    return device.torch_device.type != "cpu" and hasattr(device.module, "max_memory_allocated")


def _bytes(folder: str, dtype: str) -> int:
    """Bytes of a token's K and V in all layers."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return 2 * int(config["num_hidden_layers"] * kv_heads * dim) * getattr(torch, dtype).itemsize


def judge(reference: dict[Place, torch.Tensor], ours: dict[Place, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Hold the tokens chosen from ``ours`` against ``reference``'s logits, place by place.

    A near tie is 4 ulp of the best logit, in float32 none at all. Request 0 is the long one.
    """
    if reference.keys() != ours.keys():
        raise EngineError(f"the reference sampled {len(reference)} tokens, the kernels {len(ours)}")
    ulp = torch.finfo(dtype).eps
    equal = long_equal = near = 0
    wrong: list[dict[str, Any]] = []
    error = {"long": 0.0, "short": 0.0}
    for place in sorted(reference):
        want, got = reference[place].float(), ours[place].float()
        best, token = int(want.argmax()), int(got.argmax())
        top = float(want[best])
        bound = 0.0 if dtype == torch.float32 else 4 * ulp * 2.0 ** math.floor(math.log2(max(abs(top), 1e-30)))
        kind = "short" if place[0] else "long"
        error[kind] = max(error[kind], float((got - want).norm() / want.norm()))
        second = float(want.topk(2).values[1])
        near += top - second <= bound
        equal += token == best
        long_equal += token == best and kind == "long"
        clear = token != best and not top - float(want[token]) <= bound  # NaN is within no bound
        if clear or not math.isfinite(float(got[token])):
            wrong.append({"request": place[0], "step": place[1], "token": token, "expected": best,
                          "logits": [round(float(want[token]), 5), round(top, 5)]})  # fmt: skip
    return {
        "right": not wrong,
        "tokens": len(reference),
        "tokens_equal": equal,
        "tokens_of_the_long_one_equal": long_equal,
        "near_ties": near,
        "wrong": wrong[:20],
        "logits_relative_error": {kind: float(f"{value:.3g}") for kind, value in error.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
