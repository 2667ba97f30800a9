#!/usr/bin/env python3
"""Write docs/server-options.md from the code: every option of `dougong serve`, its variable, its default."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from dougong.cli.serve import _docs
from dougong.config import EngineConfig
from dougong.server.config import ENGINE_ONLY, OptionType, ServerConfig, option_types
from dougong.server.other_names import OTHER_NAMES, SHORT_FLAGS, OtherName, flag_of

_WORDS = {dict: "JSON", str: "text", int: "integer", float: "number"}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "server-options.md"

HEAD = """\
# Options of `dougong serve`

Written by `scripts/server_options.py` from the code. Each can be given on the command line (`--max-num-seqs 8`),
in the environment (`DOUGONG_MAX_NUM_SEQS=8`) or in the file of `--config` (`max_num_seqs: 8`); the command line goes
before the environment, and that before the file. Switches are turned off with `--no-…`, `false` or `0`. What they are
for: [The server](server.md).
"""


OTHERS = """
## vLLM's names

A command line, file or variable made for `vllm serve` goes on working as far as it says the same. Most names are the
same; the short flags {short} and underscores (`--max_model_len`) are taken too. The other names, wherever an option can
stand:

| vLLM's | here |
|---|---|
"""


def _default(kind: OptionType) -> str:
    value = kind.default
    if value is None or value in ((), {}, ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def _type(kind: OptionType) -> str:
    if kind.kind is bool:
        return "switch"
    if kind.kind is tuple:
        return f"{_WORDS[kind.item]}, many"
    return _WORDS[kind.kind]


def _means(other: OtherName) -> str:
    if other.ours is not None:
        flag = flag_of(other.ours)
        return f"`--no-{flag[2:]}`" if other.opposite else f"`{flag}`"
    if not other.accepted or other.accepted[0] == "false":
        return f"refused: {other.instead}"
    if other.switch:
        return f"always so; {other.instead}"
    return f"taken if {' or '.join(f'`{one}`' for one in other.accepted)}, else refused: {other.instead}"


def render() -> str:
    docs = _docs(ServerConfig) | _docs(EngineConfig)
    engine = {one.name for one in fields(EngineConfig)} - ENGINE_ONLY
    parts = [HEAD]
    for title, of_engine in (("The server", False), ("The engine", True)):
        parts.append(f"\n## {title}\n\n| option | takes | default | what it is |\n|---|---|---|---|\n")
        for name, kind in option_types().items():
            if (name in engine) is of_engine:
                flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
                text = " ".join(docs.get(name, "").replace("``", "`").replace("|", "\\|").split())
                parts.append(f"| `{flag}` | {_type(kind)} | {_default(kind)} | {text} |\n")
    short = ", ".join(f"`{short}`" for short in SHORT_FLAGS.values())
    parts.append(OTHERS.format(short=short))
    parts += [f"| `{flag_of(name)}` | {_means(other)} |\n" for name, other in OTHER_NAMES.items()]
    return "".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page; default: print it")
    if parser.parse_args().write:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        print(render(), end="")
