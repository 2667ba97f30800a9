"""The engine's process and its client: the same text as offline, every end of a request, deaths and restarts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from server_harness import Served

from dougong import LLM, EngineConfig, SamplingParams
from dougong.errors import ConfigError, EngineError, InvalidRequestError, ModelLoadError
from dougong.server.errors import EngineDownError
from dougong.server.process.client import EngineClient
from dougong.server.process.messages import StepCounters
from dougong.server.process.observer import RequestObserver, RequestStart
from dougong.server.process.stream import RequestStream
from dougong.types import RequestOutput


def config(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(model), "backend": "cpu", "num_kv_blocks": 64, "max_num_seqs": 8} | options)


def with_client(given: EngineConfig, work: Callable[[EngineClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        client = await EngineClient.start(given)
        try:
            return await asyncio.wait_for(work(client), 120)
        finally:
            await client.close()

    return asyncio.run(run())


async def collect(client: EngineClient, ids: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
    final = None
    async for output in client.generate(ids, params, request_id=request_id):
        final = output
    assert final is not None
    return final


class Seen(RequestObserver):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.started_ids: list[str] = []
        self.finished_ids: list[str] = []
        self.first = 0
        self.steps: list[StepCounters] = []

    def started(self, request: RequestStart) -> None:
        self.started_ids.append(request.request_id)

    def first_token(self, output: RequestOutput) -> None:
        self.first += 1

    def finished(self, output: RequestOutput) -> None:
        self.finished_ids.append(output.request_id)

    def step(self, counters: StepCounters) -> None:
        self.steps.append(counters)


async def until_refused(client: EngineClient) -> None:
    while True:
        await collect(client, [1, 2], PARAMS[0], "x")


pytestmark = pytest.mark.xdist_group("server")
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0),
    SamplingParams(max_tokens=12, temperature=1, seed=5, n=3, logprobs=2),
    SamplingParams(max_tokens=5, temperature=0, prompt_logprobs=1, logprobs=0),
    SamplingParams(max_tokens=40, temperature=1, seed=1, stop=("e", "a", "1", "}")),
    SamplingParams(max_tokens=8, temperature=0, bad_words=("x",), logit_bias={65: 3.0}),
]


def test_text_scores_and_ends_are_those_of_the_offline_engine_and_the_pool_is_full_after(tiny: Served) -> None:
    given = tiny.client.config
    prompts = [[72, 101, 108, 108, 111, i] for i in range(len(PARAMS))]
    with LLM(**{name: getattr(given, name) for name in ("model", "backend", "num_kv_blocks", "max_num_seqs")}) as llm:
        wanted = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS, use_tqdm=False)

    async def work(client: EngineClient) -> None:
        seen = Seen()
        client.observers.append(seen)
        await client.reset_prefix_cache()
        runs = (collect(client, ids, params, f"r{i}") for i, (ids, params) in enumerate(zip(prompts, PARAMS)))
        for got, want in zip(await asyncio.gather(*runs), wanted):
            assert got.finished
            assert got.num_cached_tokens == want.num_cached_tokens
            for one, other in zip(got.outputs, want.outputs, strict=True):
                assert (one.text, one.token_ids, one.finish_reason, one.stop_reason) == (
                    other.text, other.token_ids, other.finish_reason, other.stop_reason,
                )  # fmt: skip
                assert [list(entry) for entry in one.logprobs or []] == [list(e) for e in other.logprobs or []]
            if want.prompt_logprobs is not None:
                assert got.prompt_logprobs is not None
                assert got.prompt_logprobs[0] is None
                assert [list(e or {}) for e in got.prompt_logprobs] == [list(e or {}) for e in want.prompt_logprobs]
        assert sorted(seen.started_ids) == sorted(seen.finished_ids) == [f"r{i}" for i in range(len(PARAMS))]
        assert seen.first == len(PARAMS)
        assert sum(step.generated_tokens for step in seen.steps) >= 12 * 4
        assert all(step.cpu_s >= 0 and step.step_s > 0 for step in seen.steps)
        with pytest.raises(InvalidRequestError, match="259"):
            await collect(client, [1, 999], PARAMS[0], "beyond")
        # Somebody goes away in the middle: the request ends and gives its blocks back.
        stream = client.generate([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True), request_id="gone")
        await stream.__anext__()
        await stream.aclose()
        snapshot = await client.stats()
        assert snapshot.num_running == snapshot.num_waiting == 0
        assert sum(state & 2 == 2 for state in snapshot.blocks[0].states[snapshot.blocks[0].scratch_blocks :]) == 0
        assert client.num_completions == 0
        client.observers.remove(seen)

    tiny.wait_idle()
    tiny.run(lambda: work(tiny.client), 120)


def test_a_request_of_whose_tokens_no_text_can_be_made_fails_alone(
    tiny: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens of all requests of a step come in one message."""
    token = RequestStream.token

    def push(stream: RequestStream, index: int, token_id: int) -> str | None:
        if stream.output.request_id == "bad" and len(stream.output.outputs[0].token_ids) == 5:
            raise OverflowError("no such token")
        return token(stream, index, token_id)

    async def work() -> None:
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        wanted = await collect(tiny.client, [1, 2], params, "good")
        monkeypatch.setattr(RequestStream, "token", push)
        names = ("bad", "good", "other")
        bad, *rest = await asyncio.gather(
            *(collect(tiny.client, [1, 2], params, name) for name in names), return_exceptions=True
        )
        assert isinstance(bad, EngineError) and "no such token" in str(bad)
        for output in rest:
            assert isinstance(output, RequestOutput)
            assert output.outputs[0].text == wanted.outputs[0].text

    tiny.run(work)
    tiny.wait_idle()
    assert "request bad fails" in caplog.text


def test_what_stops_the_engines_start_is_raised_with_its_class_and_text(tmp_path: Path, tiny_model: Path) -> None:
    async def start(given: EngineConfig) -> None:
        client = await EngineClient.start(given)
        await client.close()

    with pytest.raises(ModelLoadError, match="nowhere"):
        asyncio.run(start(EngineConfig(model=str(tmp_path / "nowhere"))))
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        asyncio.run(start(config(tiny_model, skip_tokenizer_init=True)))


@pytest.mark.prove
def test_an_engine_that_cannot_be_started_again_is_named_in_every_refusal(tiny_model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    moved.mkdir()
    for file in tiny_model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())

    async def work(client: EngineClient) -> None:
        (moved / "config.json").unlink()
        os.kill(client.info.pid, signal.SIGKILL)
        with pytest.raises(EngineDownError, match="cannot be started again"):
            await until_refused(client)
        assert not client.healthy

    with_client(config(moved), work)
