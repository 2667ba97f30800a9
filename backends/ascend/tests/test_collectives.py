"""Several NPUs: the core's collectives on ``hccl``, and a model over two ranks, each a twin in a process of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

TWO = 2


def _join(rank: int, store: Path) -> Any:
    """Become rank ``rank``; the backend."""
    import torch.distributed as dist

    import dougong_ascend
    from dougong.hal import open_backend
    from dougong.plugins import load_plugins
    from dougong_ascend.twin import install, plugin

    torch.set_num_threads(1)
    install()
    plugins = load_plugins(entries=(), extra=[("ascend", dougong_ascend), ("twin", plugin)])
    backend = open_backend("ascend-twin", plugins=plugins)
    assert backend.device.dist_backend == "hccl"
    dist.init_process_group("hccl", store=dist.FileStore(str(store), TWO), rank=rank, world_size=TWO)
    return backend


def _collectives(rank: int, store: Path, pipe: Any) -> None:
    import torch.distributed as dist

    from dougong.hal import Collectives
    from dougong_ascend.twin import TwinRefusal

    _join(rank, store)
    found: dict[str, Any] = {}
    ours = Collectives()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32):
        x = (torch.arange(6).reshape(2, 3) * (rank + 1)).to(dtype).to("npu")
        name = str(dtype)
        found[f"reduce {name}"] = ours.all_reduce(x.clone()).cpu().tolist()
        found[f"gather {name}"] = ours.all_gather(x).cpu().tolist()
        found[f"scatter {name}"] = ours.reduce_scatter(x).cpu().tolist()
        found[f"broadcast {name}"] = ours.broadcast(x.clone(), 1).cpu().tolist()
    refused = []
    apart, double = torch.zeros(2, 3, device="npu").t(), torch.zeros(2, dtype=torch.float64, device="npu")
    for wrong in (torch.zeros(2), apart, double):
        try:
            ours.all_reduce(wrong)
        except TwinRefusal as error:
            refused.append(str(error))
    found["refused"] = refused
    pipe.send(found)
    dist.destroy_process_group()


def _config(model: str, ranks: int) -> Any:
    from dougong import EngineConfig

    return EngineConfig(
        model=model, backend="ascend-twin", dtype="float16", skip_tokenizer_init=True, max_num_seqs=4, block_size=16,
        max_model_len=128, num_kv_blocks=24, tensor_parallel_size=ranks,
    )  # fmt: skip


def _answers(engine: Any) -> list[list[int]]:
    from dougong import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = [engine.add(f"r{n}", {"prompt_token_ids": prompt}, sampling) for n, prompt in enumerate(PROMPTS)]
    while engine.has_work:
        engine.step()
    engine.close()
    return [list(output.outputs[0].token_ids) for output in outputs]


def _model(rank: int, store: Path, pipe: Any, model: str) -> None:
    import torch.distributed as dist

    from dougong import Engine
    from dougong.execution import ModelRunner
    from dougong.hal import Collectives

    backend = _join(rank, store)
    config = _config(model, TWO)
    runner = ModelRunner(config, backend=backend, collectives=Collectives())
    if rank:
        runner.follow()
    else:
        pipe.send(_answers(Engine(config, plugins=backend.plugins, runner=runner)))
    dist.destroy_process_group()


PROMPTS = [[5, 7, 9, 3], list(range(3, 40)), [11]]


def both(target: Any, store: Path, *more: Any) -> list[Any]:
    """Run ``target`` as two ranks; what each sent (rank 1 may send nothing)."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(TWO)]
    processes = [
        context.Process(target=target, args=(rank, store, pipes[rank][1], *more), daemon=True) for rank in range(TWO)
    ]
    for process in processes:
        process.start()
    assert pipes[0][0].poll(150)
    found = [pipes[0][0].recv()]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    if pipes[1][0].poll(0):
        found.append(pipes[1][0].recv())
    return found


@pytest.mark.prove
def test_collectives(tmp_path: Path) -> None:
    first, second = both(_collectives, tmp_path / "store")
    for dtype in ("torch.bfloat16", "torch.float16", "torch.float32", "torch.int32"):
        for found in (first, second):
            assert found[f"reduce {dtype}"] == [[0, 3, 6], [9, 12, 15]]
            assert found[f"gather {dtype}"] == [[0, 1, 2, 0, 2, 4], [3, 4, 5, 6, 8, 10]]
            assert found[f"broadcast {dtype}"] == [[0, 2, 4], [6, 8, 10]]
        assert (first[f"scatter {dtype}"], second[f"scatter {dtype}"]) == ([[0, 3, 6]], [[9, 12, 15]])
    assert [len(found["refused"]) for found in (first, second)] == [3, 3]


@pytest.mark.prove
def test_a_model_over_two_ranks(tmp_path: Path, backend: Any) -> None:
    """Greedy tokens of two ranks are those of one: the tiny model's are clear of rounding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dougong import Engine

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    (found,) = both(_model, tmp_path / "store", folder)
    assert found == _answers(Engine(_config(folder, 1), plugins=backend.plugins))
