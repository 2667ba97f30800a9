"""Options that every command with an engine takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, lists), else the text itself."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text
