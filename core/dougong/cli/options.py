"""Options that every command with an engine takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

__all__ = [
    "Backend",
    "BlockSize",
    "Dtype",
    "KVBlocks",
    "MaxModelLen",
    "MaxSeqs",
    "MaxTokensPerStep",
    "Model",
    "Quantization",
    "Set",
    "engine_options",
    "model_dtype",
    "numbers",
    "query_and_kv_heads",
]

Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder, .gguf file, hub id, or smollm2-135m (the packaged model).")
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", "-b", help="Accelerator to use (see `dougong doctor`); default: the best here."),
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Quantization = Annotated[
    str | None, typer.Option(help="int8 or int4 weights, fp8 weights and activations, or a plugin's format.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer together, in tokens.")]
MaxSeqs = Annotated[int, typer.Option("--max-num-seqs", help="Most requests that run at once.")]
MaxTokensPerStep = Annotated[int | None, typer.Option("--max-num-batched-tokens", help="Tokens computed in one step.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per KV block.")]
KVBlocks = Annotated[int | None, typer.Option("--num-kv-blocks", help="Blocks in the KV pool.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other engine option, e.g. --set overlap=false. Repeatable."),
]


def engine_options(extra: list[str] | None, **given: Any) -> dict[str, Any]:
    """Options for an EngineConfig: those given by name, without the Nones, and those of ``--set``."""
    options = {name: value for name, value in given.items() if value is not None}
    for item in extra or ():
        name, separator, text = item.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"--set {item!r}: expected NAME=VALUE")
        options[name.strip().replace("-", "_")] = _value(text.strip())
    return options


def query_and_kv_heads(text: str) -> tuple[int, int]:
    """``--heads`` H/K.

    Raises:
        BadParameter: it is none, or K does not divide H.
    """
    try:
        heads, kv_heads = (int(part) for part in text.split("/"))
    except ValueError:
        heads = kv_heads = 0
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise typer.BadParameter(f"--heads {text!r}: expected H/K, e.g. 9/3, where K divides H")
    return heads, kv_heads


def model_dtype(name: str) -> torch.dtype:
    """``--dtype`` where a kernel is asked for.

    Raises:
        BadParameter: models do not run in it.
    """
    import torch

    if name not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype {name!r}: expected bfloat16, float16 or float32")
    found: torch.dtype = getattr(torch, name)
    return found


def numbers(option: str, form: str, text: str, example: str) -> list[tuple[int, ...]]:
    """Lists such as N:IN:OUT[,N:IN:OUT…], all from 1 on; empty where ``text`` is.

    Raises:
        BadParameter: an entry is of another form.
    """
    found = []
    for item in filter(None, text.split(",")):
        try:
            entry = tuple(int(part) for part in item.split(":"))
        except ValueError:
            entry = ()
        if len(entry) != len(form.split(":")) or min(entry) < 1:
            raise typer.BadParameter(f"{option} {item!r}: expected {form}, integers >= 1, e.g. {example}")
        found.append(entry)
    return found


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, lists), else the text itself."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text
