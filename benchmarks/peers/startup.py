#!/usr/bin/env python3
"""Where a start's time goes, from the process's first line to the first token. For a cold one, empty Triton's cache.

python benchmarks/peers/startup.py CONFIG_DIR
"""

from __future__ import annotations

import sys
import time

STARTED = time.perf_counter()


def main() -> None:
    import torch

    after_torch = time.perf_counter() - STARTED
    import triton

    from dougong.engine import LLM
    from dougong.types import SamplingParams

    compiled: list[tuple[str, bool, float]] = []

    def heard(*, src, metadata, metadata_group, times, cache_hit):  # type: ignore[no-untyped-def]
        compiled.append((getattr(getattr(src, "fn", None), "__name__", "?"), cache_hit, times.total / 1e6))

    triton.knobs.compilation.listener = heard
    imported = time.perf_counter() - STARTED
    torch.zeros(1, device="cuda")
    device = time.perf_counter() - STARTED
    with LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=2048) as llm:
        engine = time.perf_counter() - STARTED
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
        first = time.perf_counter() - STARTED
    marks = {"torch": after_torch, "imports": imported, "device": device, "engine": engine, "first token": first}
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in marks.items()))
    cached, spent = sum(hit for _, hit, _ in compiled), sum(seconds for *_, seconds in compiled)
    print(f"{len(compiled)} kernels, {cached} from the cache, {spent:.1f} s")
    for name, hit, seconds in sorted(compiled, key=lambda one: -one[2])[:15]:
        print(f"  {name} {'cached' if hit else 'compiled'} {seconds:.2f} s")


if __name__ == "__main__":
    main()
