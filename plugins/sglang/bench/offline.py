"""One SGLang engine with one attention backend: speed of fixed workloads, and tokens to compare with another run's.

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
    parser.add_argument("--attention-backend", default="dougong")
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--workloads", default="1:128:128,16:512:128,256:512:128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.8, help="mem_fraction_static")
    parser.add_argument("--max-total-tokens", type=int, help="a bound on the KV cache, in tokens")
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
    import sglang
    import torch
    from transformers import AutoConfig

    engine = sglang.Engine(
        model_path=options.config_dir, load_format="dummy", skip_tokenizer_init=True, random_seed=0,
        attention_backend=options.attention_backend, disable_cuda_graph=options.disable_cuda_graph, page_size=16,
        context_length=4096, mem_fraction_static=options.memory,
        max_total_tokens=options.max_total_tokens,
    )  # fmt: skip
    kv_tokens = engine.get_server_info()["max_total_num_tokens"]
    vocabulary = AutoConfig.from_pretrained(options.config_dir).get_text_config().vocab_size
    rows = []
    for workload in options.workloads.split(","):
        requests, inputs, outputs = map(int, workload.split(":"))
        params = {"temperature": 0, "max_new_tokens": outputs, "ignore_eos": True}
        best, tokens = 0.0, []
        for turn in range(options.repeats + 1):  # the first warms up; fresh prompts each time but the last two
            chance = random.Random(min(turn, options.repeats - 1))
            prompts = [[chance.randrange(10, vocabulary) for _ in range(inputs)] for _ in range(requests)]
            start = time.perf_counter()
            done = engine.generate(input_ids=prompts, sampling_params=params)
            rate = requests * outputs / (time.perf_counter() - start)
            if 0 < turn < options.repeats:
                best = max(best, rate)
            tokens = [one["output_ids"] for one in done]  # the last turn's prompts are cached: prefix hits
        rows.append({"workload": workload, "tokens_per_s": best, "tokens": tokens})
        print(options.attention_backend, workload, f"{best:.0f} tokens/s", flush=True)
    engine.shutdown()
    device = torch.cuda.get_device_name()
    return {"sglang": sglang.__version__, "device": device, "kv_tokens": kv_tokens, "rows": rows}


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
