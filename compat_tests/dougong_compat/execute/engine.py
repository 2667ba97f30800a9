"""L3: greedy tokens from the engine on this backend. The engine is imported when the first such case runs."""

from __future__ import annotations

import atexit
import importlib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dougong_compat.engine_inputs import prompts
from dougong_compat.numbers import dtype_of
from dougong_compat.tiny_llama import write_files

__all__ = ["execute"]

_folders: dict[str, Path] = {}


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Every finished request's tokens go to the parent, flat, with the request's number and the prompt's."""
    params = request["params"]
    refusals = importlib.import_module("dougong.errors")
    try:
        engine = _open(ctx, params)
    except (refusals.ConfigError, refusals.KernelSelectionError) as error:
        message["refused"] = str(error)
        return
    message["provider"] = "dougong.engine"
    try:
        outputs = globals()[f"_{params['check']}"](engine, params, request["seed"])
    finally:
        engine.close()
    message["outputs"] = outputs
    tensors["done"] = torch.ones(1)


def _open(ctx: Any, params: dict[str, Any]) -> Any:
    config = importlib.import_module("dougong.config")
    engine = importlib.import_module("dougong.engine")
    dtype = params["dtype"]
    if dtype not in _folders:
        folder = Path(tempfile.mkdtemp(prefix="dougong-compat-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _folders[dtype] = write_files(folder / "model", dtype_of(dtype))
    chunk = params.get("chunk", 64)
    seqs = params.get("seqs", 4)
    options: dict[str, Any] = {
        "model": str(_folders[dtype]), "skip_tokenizer_init": True, "dtype": dtype, "backend": ctx.backend.name,
        "max_model_len": 160, "max_num_seqs": seqs, "max_num_batched_tokens": max(chunk, 1),
        "num_kv_blocks": params.get("blocks", 64), "enable_prefix_caching": params.get("prefix", True),
        "overlap": params.get("overlap", True), "warm_up": False, "seed": 0,
        "enforce_eager": bool(getattr(ctx.device, "partial_graphs", False)),
    }  # fmt: skip
    return engine.Engine(config.EngineConfig(**options), plugins=ctx.backend.plugins)


def _sampling(count: int, **more: Any) -> Any:
    types = importlib.import_module("dougong.types")
    return types.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **more)


def _drain(engine: Any, limit: int = 4000) -> dict[str, Any]:
    """Step until nothing is left; finished outputs by request id."""
    found = {}
    for _ in range(limit):
        if not engine.has_work:
            break
        for output in engine.step():
            found[output.request_id] = output
    assert not engine.has_work, "the engine did not come to an end"
    return found


def _collect(found: dict[str, Any], asked: dict[str, list[int]], count: int) -> list[dict[str, Any]]:
    rows = []
    for name, prompt in asked.items():
        output = found.get(name)
        for sibling in [] if output is None else output.outputs:
            rows.append(
                {
                    "prompt": prompt,
                    "tokens": list(sibling.token_ids),
                    "count": count,
                    "reason": str(sibling.finish_reason),
                }
            )
        if output is None:
            rows.append({"prompt": prompt, "tokens": [], "count": count, "reason": "missing"})
    return rows


def _run(engine: Any, asked: dict[str, list[int]], count: int, **more: Any) -> list[dict[str, Any]]:
    for name, prompt in asked.items():
        engine.add(name, prompt, _sampling(count, **more))
    return _collect(_drain(engine), asked, count)


def _greedy(engine: Any, params: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    return _run(engine, prompts(params, seed), params.get("count", 8))


def _preempt(engine: Any, params: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """More requests than the pool can hold: some are preempted and resumed."""
    asked = prompts({**params, "lengths": [30, 41, 17, 25, 33]}, seed)
    return _run(engine, asked, 24)


def _siblings(engine: Any, params: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    return _run(engine, prompts({**params, "lengths": [18, 33]}, seed), 7, n=params["n"])


def _warm(engine: Any, params: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """The same prompts again and again: from the second round on they hit the prefix cache."""
    rows: list[dict[str, Any]] = []
    for turn in range(params["rounds"]):
        asked = {f"{turn}-{name}": prompt for name, prompt in prompts(params, seed).items()}
        rows += _run(engine, asked, 6)
    return rows


def _abort(engine: Any, params: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """One of several is aborted on the way; the others' tokens do not change."""
    asked = prompts({**params, "lengths": [20, 33, 9]}, seed)
    for name, prompt in asked.items():
        engine.add(name, prompt, _sampling(10))
    found = {}
    for _ in range(params["after"]):
        for output in engine.step():
            found[output.request_id] = output
    victim = random.Random(seed).choice(sorted(asked))
    engine.abort(victim)
    found |= _drain(engine)
    return _collect(found, {name: prompt for name, prompt in asked.items() if name != victim}, 10)
