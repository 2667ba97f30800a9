"""The process that speaks HTTP needs no torch: it starts sooner, and holds hundreds of megabytes less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import asyncio, sys
from importlib import import_module
from dougong.cli.app import build_app
build_app()                                  # the command line, plugins' commands too
from dougong.server import run               # all that `dougong serve` runs ...
from dougong.server.app import ROUTERS
for name in ROUTERS:                         # ... with every route
    import_module(name)
from dougong.models import get_tokenizer
from dougong.server.chat.dialect import Dialect
from dougong.server.config import resolve_config
from dougong.server.process.text import TextWorker

async def work(config):                      # in place of an engine and a socket
    tokenizer = get_tokenizer(config.engine.model)
    Dialect(config, tokenizer)
    text, ids = await TextWorker(tokenizer).chat([{"role": "user", "content": "hello"}])
    assert text and ids and tokenizer.decode(ids)

run._serve = work
run.serve(resolve_config({"model": sys.argv[1]}, environ={}))
print([name for name, module in sys.modules.items() if module and name.partition(".")[0] == "torch"][:3])
"""


@pytest.mark.parametrize("kind", ["TokenizersBackend", pytest.param("LlamaTokenizer", marks=pytest.mark.prove)])
def test_the_api_process_imports_no_torch(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """A tokenizer that is all in its file, and one that transformers must look up."""
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": kind}))
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "[]", ended.stderr
    assert "torch" not in ended.stderr.lower()  # nobody is told that it is missing
