"""A device that fails in mid-run: every request ends with the cause, the engine says so and can be closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from e2e_harness import BACKEND, greedy

from dougong import AsyncEngine, Engine, EngineConfig
from dougong.errors import DeviceLostError, EngineError
from dougong.plugins import load_plugins
from dougong.types import FinishReason

#: What torch raises, with the advice that follows; it comes from whichever call is next.
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable …"
WORDS = {
    "illegal access": ILLEGAL,
    "assert": "CUDA error: device-side assert triggered",
    "ecc": "CUDA error: uncorrectable ECC error encountered",
}


class AcceleratorError(RuntimeError):
    """torch's, which older torches lack."""


class Failing:
    """Breaks an engine's device: from ``strike`` on every call raises, as a driver's sticky errors do."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, words: str = ILLEGAL) -> None:
        self.engine, self.monkeypatch, self.words = engine, monkeypatch, words

    def strike(self, *, where: str = "launch") -> None:
        runner = self.engine.runner
        self.monkeypatch.setattr(runner.backend.device, "synchronize", self._raise, raising=False)
        if where == "launch":
            self.monkeypatch.setattr(runner, "execute", self._raise)
            return
        execute = runner.execute

        def late(plan: Any) -> Any:  # the launch goes well, the wait for the result does not
            execute(plan)
            return SimpleNamespace(result=self._raise)

        self.monkeypatch.setattr(runner, "execute", late)

    def _raise(self, *_: Any) -> Any:
        raise AcceleratorError(self.words)


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


@pytest.fixture
def make(llama: Path) -> Iterator[Callable[..., Engine]]:
    made = []

    def new(**options: Any) -> Engine:
        values: dict[str, Any] = {
            "model": str(llama), "backend": BACKEND, "dtype": "float32", "max_num_seqs": 2, "max_model_len": 256,
            "num_kv_blocks": 64, "warm_up": False,
        }  # fmt: skip
        made.append(Engine(EngineConfig(**(values | options)), plugins=load_plugins(BACKEND)))
        return made[-1]

    yield new
    for engine in made:
        engine.close()


@pytest.mark.parametrize("where", ["launch", "result"])
@pytest.mark.parametrize("overlap", [True, False])
def test_requests_end_with_the_cause_and_so_does_the_engine(
    make: Callable[..., Engine], where: str, overlap: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = make(overlap=overlap)
    outputs = [engine.add(f"r{index}", [5 + index, 6], greedy(40)) for index in range(4)]  # two run, two wait
    for _ in range(4):
        engine.step()
    Failing(engine, monkeypatch).strike(where=where)
    with pytest.raises(DeviceLostError, match="illegal memory access") as caught:
        run(engine)
    text = str(caught.value)
    assert "answers no more" in text and "Start the process again" in text and "TORCH_USE_CUDA_DSA" not in text
    assert isinstance(caught.value.__cause__, AcceleratorError)
    for output in outputs:
        (one,) = output.outputs
        assert output.finished and one.finish_reason is FinishReason.ERROR
        assert one.error == f"DeviceLostError: {text}"
    assert any(record.levelno == logging.ERROR and record.getMessage() == text for record in caplog.records)
    for call in (engine.step, lambda: engine.add("later", [5], greedy(2))):
        with pytest.raises(DeviceLostError):
            call()
    caplog.clear()
    engine.close()  # asks the device for nothing that could fail
    assert any("does not answer" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_streams_hear_of_it_and_later_callers_too(
    make: Callable[..., Engine], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    served = AsyncEngine(engine=engine)

    async def scenario() -> None:
        begun = asyncio.Event()

        async def listen(index: int) -> None:
            async for _ in served.generate([5 + index], greedy(240), request_id=f"r{index}"):
                begun.set()

        tasks = [asyncio.create_task(listen(index)) for index in range(4)]
        await begun.wait()
        await served.call(lambda e: Failing(e, monkeypatch, words).strike())
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for error in found:
            assert isinstance(error, EngineError) and words.splitlines()[0] in str(error)
        with pytest.raises(EngineError, match="the device is lost"):
            async for _ in served.generate([5], greedy(2), request_id="late"):
                pass

    asyncio.run(asyncio.wait_for(scenario(), 60))
    served.close()


def test_a_step_that_fails_on_a_device_that_answers_ends_its_requests_only(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    runner = engine.runner
    plain = runner.execute

    def once(plan: Any) -> Any:
        monkeypatch.setattr(runner, "execute", plain)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(runner, "execute", once)
    first = engine.add("first", [5], greedy(3))
    run(engine)
    assert first.outputs[0].error == "EngineError: the step failed: RuntimeError: CUDA out of memory"
    second = engine.add("second", [5], greedy(3))
    run(engine)
    assert len(second.outputs[0].token_ids) == 3
