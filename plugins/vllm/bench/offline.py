"""One vLLM engine with one attention backend: speed of fixed workloads, and tokens to compare with another run's.

``--compare A B`` says how many tokens agree and how the speeds stand to one another.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-dir")
    parser.add_argument("--attention-backend", default="CUSTOM")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--workloads", default="1:128:128,16:512:128,256:512:128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.85, help="gpu_memory_utilization")
    parser.add_argument("--kv-gib", type=float, help="the KV cache's size, in place of what --memory leaves")
    parser.add_argument("--json")
    parser.add_argument("--compare", nargs=2)
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    result = measure(options)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file)
    return 0


def measure(options: Any) -> dict[str, Any]:
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=options.config_dir, load_format="dummy", skip_tokenizer_init=True, seed=0,
        attention_backend=options.attention_backend, enforce_eager=options.enforce_eager,
        enable_prefix_caching=True, max_model_len=4096, gpu_memory_utilization=options.memory,
        kv_cache_memory_bytes=None if options.kv_gib is None else int(options.kv_gib * 2**30),
    )  # fmt: skip
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    cache = llm.llm_engine.vllm_config.cache_config
    kv_tokens = cache.num_gpu_blocks * cache.block_size
    rows = []
    for workload in options.workloads.split(","):
        requests, inputs, outputs = map(int, workload.split(":"))
        params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        best, tokens = 0.0, []
        for turn in range(options.repeats + 1):  # the first warms up; fresh prompts each time but the last two
            chance = random.Random(min(turn, options.repeats - 1))
            prompts = [
                {"prompt_token_ids": [chance.randrange(10, vocabulary) for _ in range(inputs)]} for _ in range(requests)
            ]
            start = time.perf_counter()
            done = llm.generate(prompts, params, use_tqdm=False)
            rate = requests * outputs / (time.perf_counter() - start)
            if 0 < turn < options.repeats:
                best = max(best, rate)
            tokens = [list(one.outputs[0].token_ids) for one in done]  # the last turn's prompts are cached: prefix hits
        rows.append({"workload": workload, "tokens_per_s": best, "tokens": tokens})
        print(options.attention_backend, workload, f"{best:.0f} tokens/s", flush=True)
    device = torch.cuda.get_device_name()
    return {"vllm": vllm.__version__, "device": device, "kv_tokens": kv_tokens, "rows": rows}


def compare(first: str, second: str) -> int:
    """Print how the second run stands to the first; 1 if their KV caches are not equal."""
    with open(first, encoding="utf-8") as one, open(second, encoding="utf-8") as other:
        a, b = json.load(one), json.load(other)
    print(f"{second} beside {first}, on {b['device']}, KV cache of {b['kv_tokens']:,} tokens")
    print("| requests:in:out | tokens equal | first, tokens/s | second, tokens/s | second to first |")
    print("|---|---|---|---|---|")
    for left, right in zip(a["rows"], b["rows"], strict=True):
        pairs = [
            (x, y) for p, q in zip(left["tokens"], right["tokens"], strict=True) for x, y in zip(p, q, strict=True)
        ]
        equal = sum(x == y for x, y in pairs) / len(pairs)
        speeds = left["tokens_per_s"], right["tokens_per_s"]
        ratio = speeds[1] / speeds[0]
        print(f"| {left['workload']} | {equal:.1%} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.2f} |")
    if a["kv_tokens"] != b["kv_tokens"]:
        print(f"The KV caches are not equal: {a['kv_tokens']:,} and {b['kv_tokens']:,} tokens; speeds say little.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
