#!/usr/bin/env python3
"""How long the device idles in steady decode: time of a step without a profiler, time of its kernels with one.

Tracing slows the host, so a trace alone shows gaps that are its own; it is kept for the order and length of kernels.

    python benchmarks/decode_idle.py CONFIG_DIR --rows 256 --prompt 512 --trace decode.json.gz
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import random
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dougong.engine import LLM
from dougong.types import SamplingParams

STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--trace", default="decode.json.gz")
    a = parser.parse_args()
    new = 64
    draw = random.Random(1)
    prompts = [[draw.randrange(10, 30000) for _ in range(a.prompt)] for _ in range(a.rows)]
    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    with LLM(
        a.config, load_format="dummy", skip_tokenizer_init=True, max_model_len=a.prompt + new, max_num_seqs=a.rows,
        enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        llm.generate(prompts, sampling, use_tqdm=False)
        engine = llm.engine
        for index, prompt in enumerate(prompts):
            engine.add(f"p{index}", prompt, sampling)
        for _ in range(a.rows * a.prompt // 8192 + 12):
            engine.step()

        def wall(steps: int) -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
            return (time.perf_counter() - started) / steps * 1e3

        plain = wall(16)
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            slowed = wall(STEPS)
    traced.export_chrome_trace(a.trace)
    raw = Path(a.trace).read_bytes()
    events = json.loads(gzip.decompress(raw) if a.trace.endswith(".gz") else raw)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: e["ts"])
    busy, last = 0.0, events[0]["ts"]
    gaps: dict[tuple[str, str], float] = collections.defaultdict(float)
    before = ""
    for event in events:
        start, end, name = event["ts"], event["ts"] + event["dur"], event["name"][:40]
        if start > last:
            gaps[before, name] += start - last
        busy += max(0.0, end - max(start, last))
        last, before = max(last, end), name
    busy /= STEPS * 1e3
    print(json.dumps({
        "rows": a.rows, "step_ms": round(plain, 3), "busy_ms": round(busy, 3),
        "idle": round(1 - busy / plain, 4), "step_ms_traced": round(slowed, 3),
    }))  # fmt: skip
    for pair, us in sorted(gaps.items(), key=lambda item: -item[1])[:14]:
        print(f"{us / STEPS:8.1f} us/step  {pair[0]} -> {pair[1]}")


if __name__ == "__main__":
    main()
