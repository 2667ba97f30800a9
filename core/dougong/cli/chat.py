"""``dougong chat``: a conversation in the terminal, with a model in this process or with a server's."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console

from dougong.cli import options
from dougong.cli.generate import Figures, stream_text
from dougong.cli.remote import Remote
from dougong.errors import EngineError, InvalidRequestError
from dougong.types import SamplingParams

__all__ = ["chat"]

_HELP = "/new starts over · /undo takes back the last turn · /quit (or Ctrl-D) leaves"

#: Prints the answer to the messages while it grows; gives back its text and a line of figures.
Answer = Callable[[list[dict[str, Any]]], tuple[str, str]]


def chat(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder, .gguf file, hub id, or smollm2-135m; with --url a name that it serves."
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(envvar="DOUGONG_URL", help="Talk with this OpenAI-compatible server instead.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["DOUGONG_API_KEY", "OPENAI_API_KEY"], help="The server's key.")
    ] = None,
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
    notes = Console(stderr=True, soft_wrap=True)
    opening = [{"role": "system", "content": system}] if system else []
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    given = options.engine_options(
        set_, backend=backend, quantization=quantization, max_model_len=max_model_len,
        dtype=None if dtype == "auto" else dtype,
    )  # fmt: skip
    if url is not None:
        if given:
            raise typer.BadParameter(f"{', '.join(sorted(given))}: the server's own choice; leave it out with --url")
        remote = Remote(url, api_key)
        name = model or _served(remote)
        notes.print(f"[bold]{name}[/] at {remote.url}. {_HELP}", style="dim")
        _converse(_remote_answer(remote, name, sampling, notes), opening, notes)
        return
    from dougong.engine import LLM

    given.setdefault("max_num_seqs", 1)
    name = model or "smollm2-135m"
    with LLM(name, **given) as llm:
        notes.print(f"[bold]{name}[/] on {llm.engine.runner.backend.name}. {_HELP}", style="dim")
        _converse(_local_answer(llm, sampling), opening, notes)


def _converse(answer: Answer, opening: list[dict[str, Any]], notes: Console) -> None:
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
        asked = [*turns, {"role": "user", "content": said}]
        try:
            text, figures = answer(asked)
        except InvalidRequestError as error:
            notes.print(f"{error} /new starts over.", style="red", markup=False)
            continue
        except EngineError as error:
            notes.print(str(error), style="red", markup=False)
            continue
        except KeyboardInterrupt:
            notes.print("\n(interrupted)", style="dim")
            continue
        turns = [*asked, {"role": "assistant", "content": text}]
        notes.print(figures, style="dim", highlight=False)


def _local_answer(llm: Any, sampling: SamplingParams) -> Answer:
    def answer(messages: list[dict[str, Any]]) -> tuple[str, str]:
        figures = Figures(llm)
        output = stream_text(llm, llm.chat_prompt(messages), sampling, figures)
        return output.outputs[0].text, figures.line(output)

    return answer


def _served(remote: Remote) -> str:
    names = remote.models()
    if not names:
        raise EngineError(f"{remote.url} serves no model.")
    return names[0]


def _remote_answer(remote: Remote, model: str, sampling: SamplingParams, notes: Console) -> Answer:
    wanted: dict[str, Any] = {
        "model": model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        wanted["seed"] = sampling.seed

    def answer(messages: list[dict[str, Any]]) -> tuple[str, str]:
        text, reason = "", ""
        usage: dict[str, Any] = {}
        started = perf_counter()
        first = last = None
        for chunk in remote.chat(messages, **wanted):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                delta = choice.get("delta") or {}
                thought, piece = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content") or ""
                if thought or piece:
                    last = perf_counter()
                    first = last if first is None else first
                if thought:
                    notes.print(thought, end="", style="dim", markup=False, highlight=False)
                if piece:
                    text += piece
                    print(piece, end="", flush=True)
        print()
        return text, _line(usage, reason, started, first, last)

    return answer


def _line(usage: dict[str, Any], reason: str, started: float, first: float | None, last: float | None) -> str:
    prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    parts = []
    if prompt is not None and made is not None:
        parts.append(f"{prompt} prompt + {made} new tokens")
        if first is not None and last is not None and made > 1 and last > first:
            parts.append(f"{(made - 1) / (last - first):.1f} tokens/s")
    if first is not None:
        parts.append(f"first token after {(first - started) * 1000:.0f} ms")
    if reason:
        parts.append(f"ended by {reason}")
    return " · ".join(parts)
