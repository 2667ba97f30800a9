"""Measure ``attn_implementation="dougong"`` beside transformers' own, in one process, in turns.

    python -m dougong_transformers.bench                                  # SmolLM2-135M on this machine's processor
    python -m dougong_transformers.bench --device cuda --dtype bfloat16 --config-dir configs/qwen3-0.6b \\
        --workloads 256:512:128

``--config-dir`` makes a model of that configuration with random weights; prompts are random token ids, lengths fixed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import dougong_transformers
from dougong.models.loading.source import resolve_model

__all__ = ["main", "measure"]


def main(argv: list[str] | None = None) -> int:
    """Print a table, and with ``--json FILE`` write the figures."""
    options = _parser().parse_args(argv)
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = _load(options)
    rows = []
    for text in options.workloads.split(","):
        requests, inputs, outputs = map(int, text.split(":"))
        for mode in options.modes.split(","):
            rows.append(measure(model, mode, requests, inputs, outputs, options))
            _show(rows[-1])
    if options.json:
        about = {
            "date": datetime.date.today().isoformat(),
            "device": _device_name(options.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": __import__("transformers").__version__,
            "dougong_transformers": dougong_transformers.__version__,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "options": vars(options), "rows": rows}, file, indent=1)
    return 0


def measure(model: Any, mode: str, requests: int, inputs: int, outputs: int, options: argparse.Namespace) -> Any:
    """Output tokens per second of each implementation, run in turns; the median, the best and all runs.

    ``mode``: "batch" is continuous batching (generate_batch), "generate" is plain generate of one batch.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, vocabulary, (requests, inputs), generator=generator)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=outputs, min_new_tokens=outputs, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    pages = -(-(inputs + outputs) // options.page_size) * requests + requests
    batching = ContinuousBatchingConfig(
        page_size=options.page_size, num_blocks=pages, max_batch_tokens=options.max_batch_tokens
    )
    found: dict[str, list[float]] = {name: [] for name in options.implementations.split(",")}
    answers: dict[str, Any] = {}
    for turn in range(options.repeats + 1):
        for name, rates in found.items():
            model.set_attn_implementation(name)
            start = time.perf_counter()
            if mode == "batch":
                done = model.generate_batch(
                    prompts.tolist(),
                    generation_config=generation,
                    continuous_batching_config=batching,
                    progress_bar=False,
                )
                tokens = [done[key].generated_tokens for key in sorted(done, key=lambda k: int(k.rsplit("_", 1)[-1]))]
            else:
                ids = prompts.to(model.device)
                mask = torch.ones_like(ids)
                tokens = model.generate(ids, attention_mask=mask, generation_config=generation)[:, inputs:].tolist()
            seconds = time.perf_counter() - start
            assert all(len(one) == outputs for one in tokens), "a request ended early"
            answers[name] = tokens
            if turn:  # the first warms up
                rates.append(requests * outputs / seconds)
    first = next(iter(answers.values()))
    alike = {
        name: sum(a == b for one, other in zip(tokens, first, strict=True) for a, b in zip(one, other, strict=True))
        / (requests * outputs)
        for name, tokens in answers.items()
    }
    return {
        "mode": mode, "requests": requests, "input": inputs, "output": outputs,
        "tokens_per_s": {n: {"median": statistics.median(r), "best": max(r), "runs": r} for n, r in found.items()},
        "tokens_equal_to_the_first": alike,
    }  # fmt: skip


def _show(row: Any) -> None:
    rates = row["tokens_per_s"]
    text = ", ".join(
        f"{name} {rate['median']:.1f} (best {rate['best']:.1f}, equal {row['tokens_equal_to_the_first'][name]:.0%})"
        for name, rate in rates.items()
    )
    print(f"{row['mode']:8} {row['requests']} x {row['input']} -> {row['output']}: output tokens/s: {text}", flush=True)


def _load(options: argparse.Namespace) -> Any:
    dtype = getattr(torch, options.dtype)
    if options.config_dir:
        config = AutoConfig.from_pretrained(options.config_dir)
        with torch.device(options.device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    else:
        folder = str(resolve_model(options.model).folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device)
    return model.eval().requires_grad_(False)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a folder or a hub id (default: %(default)s)")
    parser.add_argument("--config-dir", help="a folder with config.json: random weights in place of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: leave as they are")
    parser.add_argument("--workloads", default="8:256:32", help="requests:input:output, comma-separated")
    parser.add_argument("--modes", default="batch,generate", help="batch, generate")
    parser.add_argument("--implementations", default="sdpa,dougong")
    parser.add_argument("--page-size", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
