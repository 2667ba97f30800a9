"""``dougong chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dougong.cli import options
from dougong.cli.generate import Figures, stream_text
from dougong.errors import InvalidRequestError
from dougong.types import SamplingParams

__all__ = ["chat"]

_HELP = "/new starts over · /undo takes back the last turn · /quit (or Ctrl-D) leaves"


def chat(
    model: options.Model = "smollm2-135m",
    backend: options.Backend = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    max_model_len: options.MaxModelLen = None,
    set_: options.Set = None,
) -> None:
    """Talk with a model. Earlier turns stay in the prefix cache, so an answer starts at once."""
    from dougong.engine import LLM

    notes = Console(stderr=True, soft_wrap=True)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    given = options.engine_options(
        set_, backend=backend, dtype=dtype, quantization=quantization, max_model_len=max_model_len
    )
    given.setdefault("max_num_seqs", 1)
    with LLM(model, **given) as llm:
        notes.print(f"[bold]{llm.model_path.name}[/] on {llm.engine.runner.backend.name}. {_HELP}", style="dim")
        opening = [{"role": "system", "content": system}] if system else []
        turns = list(opening)
        while True:
            try:
                said = input("> ").strip()
            except EOFError:
                print()
                return
            if said in ("/quit", "/exit"):
                return
            if said == "/new":
                turns = list(opening)
                continue
            if said == "/undo":
                turns = turns[: max(len(opening), len(turns) - 2)]
                continue
            if said.startswith("/"):
                notes.print(_HELP, style="dim")
                continue
            if not said:
                continue
            figures = Figures(llm)
            try:
                prompt = llm.chat_prompt([*turns, {"role": "user", "content": said}])
                output = stream_text(llm, prompt, sampling, figures)
            except InvalidRequestError as error:
                notes.print(f"{error} /new starts over.", style="red")
                continue
            except KeyboardInterrupt:
                notes.print("\n(interrupted)", style="dim")
                continue
            turns += [{"role": "user", "content": said}, {"role": "assistant", "content": output.outputs[0].text}]
            notes.print(figures.line(output), style="dim", highlight=False)
