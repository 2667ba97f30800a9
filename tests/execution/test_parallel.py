"""Two ranks on the host give one rank's tokens, and end with the one that drives."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from execution_harness import drive, make_runner, prompts, request
from fake_grammar import FakeGrammar

from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.execution.parallel import open_ranks
from dougong.scheduling import Request
from dougong.types import SamplingParams, StructuredOutput

OPTIONS: dict[str, Any] = {"max_num_batched_tokens": 9, "num_kv_blocks": 24}


def _requests() -> list[Any]:
    given = prompts(6)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.8, "seed": 5}, {"frequency_penalty": 1.0, "repetition_penalty": 1.2},
        {"logprobs": 2, "temperature": 1.0}, {"prompt_logprobs": 1},
    ]  # fmt: skip
    free = [request(f"r{i}", prompt, max_tokens=10, **kind) for i, (prompt, kind) in enumerate(zip(given, kinds))]
    structured = StructuredOutput(regex="x")  # the grammar is a fake: only rank 0 has it, and sends its masks
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=2, structured=structured)
    return [*free, Request("guided", given[5], params, grammar=FakeGrammar())]


def _rank(rank: int, port: int, folder: str, here: str, answers: Any) -> None:
    sys.path.insert(0, here)
    import torch
    import torch.distributed as dist
    from execution_harness import host_backend, sharpen_model

    from dougong.execution import ModelRunner
    from dougong.hal import Collectives
    from dougong.models import load_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = EngineConfig(
        model=folder, load_format="dummy", dtype="float32", max_num_seqs=4, max_model_len=64, block_size=4,
        tensor_parallel_size=2, **OPTIONS,
    )  # fmt: skip
    backend, collectives = host_backend(), Collectives()
    loaded = load_model(config, backend, collectives=collectives)
    sharpen_model(loaded.model, 30.0)
    runner = ModelRunner(config, backend=backend, collectives=collectives, model=loaded)
    if rank:
        runner.follow()
    else:
        runner.warm_up()
        answers.put(drive(runner, _requests(), overlap=True))
        runner.close()
    dist.destroy_process_group()


def test_two_ranks_give_one_ranks_tokens(llama_folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    here = str(Path(__file__).parent)
    ranks = [context.Process(target=_rank, args=(rank, port, str(llama_folder), here, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        got = answers.get(timeout=200)
    except queue.Empty:
        pytest.fail(f"no answer; exit codes {[process.exitcode for process in ranks]}")
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert got == drive(make_runner(llama_folder, **OPTIONS), _requests())


def test_torchrun_must_start_as_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 3 ranks"):
        open_ranks(EngineConfig(tensor_parallel_size=2), None, None, None)


def test_a_step_travels_between_ranks() -> None:
    from dougong.execution.delta import DeltaReader, StepDelta
    from dougong.scheduling import StepPlan

    one = request("a", range(3, 900), temperature=0.5, logit_bias={4: 1.0})
    one.batch_index = 2
    plan = StepPlan(0, [one], [0], [800], [False], 0, 800, True, admitted=[one], new_blocks=[(2, 0, 0, [5, 6])])
    import pickle

    delta = DeltaReader(4, 1, 0).read(plan)
    again = pickle.loads(pickle.dumps(delta))
    assert isinstance(again, StepDelta)
    assert again.token_ids.tolist() == list(range(3, 803))
    assert again.admitted[0].sampling == SamplingParams(temperature=0.5, max_tokens=8, logit_bias={4: 1.0})
    assert again.changes[0].blocks.tolist() == [5, 6]


@pytest.mark.prove
def test_ranks_started_by_the_runner_itself(llama_folder: Path) -> None:
    pytest.importorskip("dougong_cpu")
    from dougong.execution import ModelRunner

    def tokens(size: int) -> dict[str, list[int]]:
        config = EngineConfig(
            model=str(llama_folder), load_format="dummy", dtype="float32", max_num_seqs=4, max_model_len=64,
            tensor_parallel_size=size, backend="cpu", **OPTIONS,
        )  # fmt: skip
        runner = ModelRunner(config)
        try:
            return drive(runner, _requests(), overlap=True)
        finally:
            runner.close()

    assert tokens(2) == tokens(1)


def test_a_rank_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dougong.errors import EngineError
    from dougong.execution.rank import start_ranks

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match=r"rank 1 of 2 did not start \(exit code 1\)"):
        start_ranks(EngineConfig(), 2, 0)
