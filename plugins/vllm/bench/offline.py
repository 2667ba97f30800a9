"""One vLLM engine with one attention backend: speed of fixed workloads, and tokens to compare with another run's.

``--follow A`` has the engine go along A's tokens. ``--compare A B`` says how many tokens of B, which followed A, agree,
and how the speeds stand to one another. benchmarks/peers must be on PYTHONPATH, as run.sh has it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from following import best_two, follow, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder with weights: benchmarks/peers/random_weights.py writes one")
    parser.add_argument("--attention-backend", default="CUSTOM")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--workloads", default="1:128:128,16:512:128,256:512:128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.85, help="gpu_memory_utilization")
    parser.add_argument("--kv-gib", type=float, help="the KV cache's size, in place of what --memory leaves")
    parser.add_argument("--json")
    parser.add_argument("--follow", metavar="A", help="another run's --json")
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
        model=options.model, skip_tokenizer_init=True, seed=0,
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
        best = 0.0
        for turn in range(options.repeats + 1):  # the first warms up
            prompts = draw(turn, requests, inputs, vocabulary)
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
            rate = requests * outputs / (time.perf_counter() - start)
            if turn:
                best = max(best, rate)
        row: dict[str, Any] = {"workload": workload, "tokens_per_s": best}
        prompts = draw(options.repeats + 1, requests, inputs, vocabulary)
        if options.follow and Path(options.follow).exists():  # the first may be lost: speeds are then all there is

            def generate(prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
                each = [
                    SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                    for count in counts
                ]
                given: Any = [{"prompt_token_ids": one} for one in prompts]
                return [list(one.outputs[0].token_ids) for one in llm.generate(given, each, use_tqdm=False)]

            row["following"] = followed(options.follow, workload, prompts, generate)
        elif not options.follow:
            params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False, logprobs=2)
            done = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
            row["tokens"] = [list(one.outputs[0].token_ids) for one in done]
            row["logits"] = [
                [
                    best_two({token: entry.logprob for token, entry in step.items()}, vocabulary)
                    for step in one.outputs[0].logprobs or ()
                ]
                for one in done
            ]
        rows.append(row)
        print(options.attention_backend, workload, f"{best:.0f} tokens/s", flush=True)
    device = torch.cuda.get_device_name()
    return {"vllm": vllm.__version__, "device": device, "kv_tokens": kv_tokens, "rows": rows}


def draw(seed: int, requests: int, inputs: int, vocabulary: int) -> list[list[int]]:
    """Prompts of one turn, another turn's are others."""
    chance = random.Random(seed)
    return [[chance.randrange(10, vocabulary) for _ in range(inputs)] for _ in range(requests)]


def followed(path: str, workload: str, prompts: list[list[int]], generate: Any) -> dict[str, Any]:
    """How this engine goes along the tokens of the run at ``path``."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if row["workload"] == workload)
    return follow(prompts, row["tokens"], row["logits"], generate)


def compare(first: str, second: str) -> int:
    """Print how the second run, which followed the first, stands to it; 1 if tokens or KV caches are not equal."""
    a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (first, second))
    print(f"{second} beside {first}, on {b['device']}, KV cache of {b['kv_tokens']:,} tokens")
    print(
        "| requests:in:out | tokens equal | near ties | wrong | first, tokens/s | second, tokens/s | second to first |"
    )
    print("|---|---|---|---|---|---|---|")
    failed = 0
    for left, right_ in zip(a["rows"], b["rows"], strict=True):
        found = right_["following"]
        speeds = left["tokens_per_s"], right_["tokens_per_s"]
        equal = f"{found['equal']:,} of {found['tokens']:,} ({found['equal'] / found['tokens']:.1%})"
        print(
            f"| {left['workload']} | {equal} | {found['near_ties']} | {found['wrong']} | "
            f"{speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[1] / speeds[0]:.2f} |"
        )
        if not right(found):
            failed = 1
            print(
                f"Not equal: every token that is no near tie must be, and 98% of all. First: {found['differing'][:3]}"
            )
    if a["kv_tokens"] != b["kv_tokens"]:
        print(f"The KV caches are not equal: {a['kv_tokens']:,} and {b['kv_tokens']:,} tokens; speeds say little.")
        return 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
