"""Two gloo ranks give one rank's logits: divided layers, divided loading, divided or replicated kv heads."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dougong.errors import ConfigError
from tests.models.conftest import save_model

#: Two kv heads are divided, one is held twice; a vocabulary of 97 leaves the last rank one row short.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma2-tied-one-kv-head": ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6}),
    "phi3": ("Phi3", {}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}
TOKENS = [5, 9, 33, 70, 2, 41, 96, 3, 3, 18, 60]


def logits_of(folder: str, collectives: Any, **options: Any) -> torch.Tensor:
    sys.path.insert(0, str(Path(__file__).parent))
    from model_harness import PagedModel, host_backend

    from dougong.config import EngineConfig
    from dougong.models import load_model

    backend = host_backend()
    loaded = load_model(EngineConfig(model=folder, **{"dtype": "float32", **options}), backend, collectives=collectives)
    return PagedModel(loaded.model, backend, collectives=collectives).run(TOKENS, (6, 1))


def rank_main(rank: int, address: str, jobs: list[tuple[str, dict[str, Any]]], answer: str) -> None:
    import torch.distributed as dist

    from dougong.hal import Collectives

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    try:
        done = [logits_of(folder, Collectives(), **options) for folder, options in jobs]
        torch.save(done, f"{answer}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.prove  # `make test` has tests/execution/test_parallel.py: two ranks through the whole runner
def test_two_ranks_give_one_ranks_logits(tmp_path: Path) -> None:
    jobs: list[tuple[str, dict[str, Any]]] = []
    for name, (kind, changes) in MODELS.items():
        save_model(tmp_path / name, kind, **changes)
        jobs.append((str(tmp_path / name), {}))
    jobs.append((str(tmp_path / "phi3"), {"load_format": "dummy", "seed": 3}))
    one_rank = [logits_of(folder, None, **options) for folder, options in jobs]
    answer = str(tmp_path / "answer")
    multiprocessing.spawn(rank_main, args=(str(tmp_path / "meet"), jobs, answer), nprocs=2, join=True)
    for rank in range(2):
        got = torch.load(f"{answer}.{rank}")
        for (folder, _), mine, want in zip(jobs, got, one_rank, strict=True):
            torch.testing.assert_close(mine, want, atol=2e-5, rtol=2e-4, msg=lambda m, f=folder: f"{f}: {m}")
            assert mine.argmax(-1).tolist() == want.argmax(-1).tolist()


@pytest.mark.parametrize("size", [3, 8])
def test_heads_that_cannot_be_divided_are_refused(tmp_path: Path, size: int) -> None:
    from dougong.models import read_config

    save_model(tmp_path, "Llama")
    config = read_config(tmp_path)
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={size}: 4 query heads and 2 kv heads"):
        config.attention_specs(torch.float32, size=size)


def test_kv_heads_are_held_twice_where_ranks_are_more(tmp_path: Path) -> None:
    from dougong.models import read_config

    save_model(tmp_path, "Llama")
    spec = read_config(tmp_path).attention_specs(torch.float32, size=4)[0]
    assert (spec.num_heads, spec.num_kv_heads) == (1, 1)


if os.name != "posix":  # pragma: no cover
    pytest.skip("gloo over a file needs POSIX", allow_module_level=True)
