"""``dougong generate``: complete one prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console

from dougong.cli import options
from dougong.types import RequestOutput, SamplingParams

__all__ = ["Figures", "generate", "stream_text"]


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to complete; '-' reads it from standard input.")],
    model: options.Model = "smollm2-135m",
    backend: options.Backend = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string. Repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's message, through the chat template.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    max_model_len: options.MaxModelLen = None,
    block_size: options.BlockSize = None,
    num_kv_blocks: options.KVBlocks = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    set_: options.Set = None,
) -> None:
    """Complete PROMPT and print the answer as it is made."""
    from dougong.engine import LLM

    if prompt == "-":
        prompt = sys.stdin.read()
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
        stop=tuple(stop or ()), ignore_eos=ignore_eos,
    )  # fmt: skip
    given = options.engine_options(
        set_, backend=backend, dtype=dtype, quantization=quantization, max_model_len=max_model_len,
        block_size=block_size, num_kv_blocks=num_kv_blocks,
    )  # fmt: skip
    given.setdefault("max_num_seqs", 1)
    with LLM(model, **given) as llm:
        ready = llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
        figures = Figures(llm)
        output = stream_text(llm, ready, sampling, figures, quiet=as_json)
        if as_json:
            print(json.dumps(_answer(output, figures), ensure_ascii=False))
        else:
            notes = Console(stderr=True, soft_wrap=True)
            notes.print(figures.line(output), style="dim", highlight=False)
            if not chat and not output.outputs[0].text.strip() and getattr(llm.get_tokenizer(), "chat_template", None):
                notes.print("The model ended at once. It was made for conversations: try --chat.", highlight=False)
        if output.outputs[0].error:
            raise typer.Exit(1)


@dataclass
class Figures:
    """What a run took, for the line below the answer."""

    llm: Any
    peak_blocks: int = 0

    def look(self) -> None:
        """Called after each step."""
        pools = [group.pool for group in self.llm.engine.kv.groups]
        self.peak_blocks = max(self.peak_blocks, sum(pool.num_usable - pool.num_free for pool in pools))

    @property
    def usable_blocks(self) -> int:
        return sum(group.pool.num_usable for group in self.llm.engine.kv.groups)

    def rates(self, output: RequestOutput) -> dict[str, float | None]:
        """Seconds to the first token, and tokens per second after it."""
        times, count = output.times, len(output.outputs[0].token_ids)
        if times.arrival is None or times.first_token is None or times.last_token is None:
            return {"first_token_s": None, "tokens_per_s": None}
        after = times.last_token - times.first_token
        rate = (count - 1) / after if count > 1 and after > 0 else None
        return {"first_token_s": times.first_token - times.arrival, "tokens_per_s": rate}

    def line(self, output: RequestOutput) -> str:
        completion, rates = output.outputs[0], self.rates(output)
        first, rate = rates["first_token_s"], rates["tokens_per_s"]
        share = 100 * self.peak_blocks / max(1, self.usable_blocks)
        parts = [
            f"{len(output.prompt_token_ids)} prompt + {len(completion.token_ids)} new tokens",
            f"{rate:.1f} tokens/s" if rate else "",
            f"first token after {first * 1000:.0f} ms" if first is not None else "",
            f"KV {self.peak_blocks} of {self.usable_blocks} blocks ({share:.1f}%)",
            f"backend {self.llm.engine.runner.backend.name}",
            f"ended by {completion.finish_reason}",
        ]
        line = " · ".join(part for part in parts if part)
        return f"{line}\n{completion.error}" if completion.error else line


def stream_text(
    llm: Any, prompt: Any, sampling: SamplingParams, figures: Figures, *, quiet: bool = False
) -> RequestOutput:
    """Run one prompt, printing its text as it grows; returns the finished output."""
    shown = 0
    final: RequestOutput | None = None
    started = monotonic()
    for output in llm.stream(prompt, sampling):
        final = output
        figures.look()
        text = output.outputs[0].text
        if not quiet and len(text) > shown:
            print(text[shown:], end="", flush=True)
            shown = len(text)
    if final is None:
        raise RuntimeError(f"the request ended without an output after {monotonic() - started:.1f} s")
    if not quiet:
        print()
    return final


def _answer(output: RequestOutput, figures: Figures) -> dict[str, Any]:
    completion = output.outputs[0]
    prompt, new = len(output.prompt_token_ids), len(completion.token_ids)
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": str(completion.finish_reason),
        "stop_reason": completion.stop_reason,
        "error": completion.error,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "cached_tokens": output.num_cached_tokens,
        },
        "kv_blocks": {"peak": figures.peak_blocks, "usable": figures.usable_blocks},
        **figures.rates(output),
        "backend": figures.llm.engine.runner.backend.name,
        "model": str(figures.llm.model_path),
    }
