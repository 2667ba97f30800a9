"""Many callers at once: each gets its own tokens, and one that goes away leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_harness import BACKEND, Reference, check_clean, greedy, prompts

from dougong import AsyncEngine, Engine, EngineConfig, SamplingParams
from dougong.errors import EngineError, InvalidRequestError
from dougong.plugins import load_plugins
from dougong.types import FinishReason, RequestOutput


def make(llama: Path, **options: Any) -> AsyncEngine:
    values: dict[str, Any] = {
        "model": str(llama), "backend": BACKEND, "dtype": "float32", "max_num_seqs": 8, "max_model_len": 256,
        "num_kv_blocks": 64, "warm_up": False,
    }  # fmt: skip
    return AsyncEngine(engine=Engine(EngineConfig(**(values | options)), plugins=load_plugins(BACKEND)))


@pytest.fixture(scope="module")
def shared(llama: Path) -> Iterator[AsyncEngine]:
    engine = make(llama)
    yield engine
    engine.close()


def run(engine: AsyncEngine, scenario: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """The scenario, and then the engine must be left clean."""

    async def both() -> None:
        await asyncio.wait_for(scenario(engine), 240)
        await engine.call(check_clean)

    asyncio.run(both())


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    outputs = [output async for output in stream]
    assert outputs[-1].finished
    return outputs[-1]


def test_many_streams_at_once_get_their_own_tokens(shared: AsyncEngine, reference: Reference) -> None:
    items = prompts(30)

    async def one(index: int) -> None:
        await asyncio.sleep(index % 5 * 0.01)
        shown = [0]
        ids: list[int] = []
        async for output in shared.generate(items[index], greedy(12), request_id=f"r{index}"):
            ids = list(output.outputs[0].token_ids)
            shown.append(len(ids))
        assert shown == sorted(shown) and ids == reference.greedy(items[index], 12)

    async def scenario(engine: AsyncEngine) -> None:
        await asyncio.gather(*(one(index) for index in range(len(items))))

    run(shared, scenario)


def test_a_cancelled_task_aborts_its_request_and_frees_its_blocks(shared: AsyncEngine, reference: Reference) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        item = prompts()[2]
        started = asyncio.Event()

        async def leave() -> None:
            async for _ in engine.generate(item, greedy(200), request_id="leaves"):
                started.set()

        stays = asyncio.create_task(last(engine.generate(item, greedy(16), request_id="stays")))
        task = asyncio.create_task(leave())
        await started.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await engine.call(lambda e: None)  # the abort was asked for before this
        assert await engine.call(lambda e: e.scheduler.get("leaves")) is None
        assert (await stays).outputs[0].token_ids == reference.greedy(item, 16)

    run(shared, scenario)


def test_a_closed_iterator_and_a_cancel_before_the_first_output(shared: AsyncEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = engine.generate([5, 6], greedy(200), request_id="closed")
        await anext(stream)
        await stream.aclose()
        early = asyncio.create_task(last(engine.generate([7] * 30, greedy(200), request_id="early")))
        await asyncio.sleep(0)
        early.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await early

    run(shared, scenario)


def test_abort_by_id_gives_the_iterator_its_end(shared: AsyncEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        engine.abort("unknown")
        final = None
        async for output in engine.generate([5, 6], greedy(200), request_id="bad"):
            engine.abort("bad")
            final = output
        assert final is not None and final.outputs[0].finish_reason is FinishReason.ABORT
        engine.abort("bad")

    run(shared, scenario)


def test_an_error_for_one_request_touches_no_other(shared: AsyncEngine, reference: Reference) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        item = prompts()[2]
        good = asyncio.create_task(last(engine.generate(item, greedy(20), request_id="good")))
        await asyncio.sleep(0)
        for prompt, match in (("", "empty"), ([5] * 300, "max_model_len")):
            with pytest.raises(InvalidRequestError, match=match):
                await last(engine.generate(prompt, greedy(4), request_id="bad"))
        with pytest.raises(InvalidRequestError, match="'good' is in use"):
            await last(engine.generate([5], greedy(4), request_id="good"))
        # One that comes with an id in use, and goes before it hears of it, must not take the other with it.
        twin = asyncio.create_task(last(engine.generate([5], greedy(4), request_id="good")))
        await asyncio.sleep(0)
        twin.cancel()
        with contextlib.suppress(asyncio.CancelledError, InvalidRequestError):
            await twin
        assert (await good).outputs[0].token_ids == reference.greedy(item, 20)

    run(shared, scenario)


def test_a_step_that_raises_ends_its_requests_and_serves_the_next(
    llama: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(llama)
    try:

        async def scenario(engine: AsyncEngine) -> None:
            runner = engine.engine.runner
            plain = runner.execute

            def once(plan: Any) -> Any:
                monkeypatch.setattr(runner, "execute", plain)
                raise RuntimeError("ouch")

            await engine.call(lambda _: monkeypatch.setattr(runner, "execute", once))
            failed = await last(engine.generate([5, 6], greedy(4), request_id="a"))
            assert failed.outputs[0].finish_reason is FinishReason.ERROR
            assert failed.outputs[0].error == "EngineError: the step failed: RuntimeError: ouch"
            item = prompts()[2]
            served = await last(engine.generate(item, greedy(4), request_id="a"))
            assert served.outputs[0].token_ids == reference.greedy(item, 4)

        run(engine, scenario)
    finally:
        engine.close()


def test_close_while_busy_tells_everybody_and_refuses_what_comes_after(llama: Path) -> None:
    engine = make(llama)

    async def scenario() -> None:
        begun = asyncio.Event()

        async def listen(index: int) -> None:
            async for _ in engine.generate([5 + index], greedy(240), request_id=f"r{index}"):
                begun.set()

        tasks = [asyncio.create_task(listen(index)) for index in range(12)]
        await begun.wait()
        closing = threading.Thread(target=engine.close)
        closing.start()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert all(isinstance(one, EngineError) and "closed" in str(one) for one in found)
        await asyncio.to_thread(closing.join)
        with pytest.raises(EngineError, match="closed"):
            await last(engine.generate([5], greedy(2), request_id="late"))
        with pytest.raises(EngineError, match="closed"):
            await engine.call(lambda e: None)
        engine.abort("late")

    asyncio.run(scenario())
    engine.close()
    assert not engine.engine._groups
    for group in engine.engine.kv.groups:
        assert group.pool.num_free == group.pool.num_usable


def test_an_engine_that_breaks_tells_everybody(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(llama)

    def broken() -> Any:
        raise ZeroDivisionError("a bug")

    async def scenario() -> None:
        monkeypatch.setattr(engine.engine, "step", broken)
        for _ in range(2):
            with pytest.raises(EngineError, match="a bug"):
                await last(engine.generate([5], greedy(2), request_id="r"))

    asyncio.run(asyncio.wait_for(scenario(), 60))
    engine.close()


def test_call_gives_back_values_and_errors(shared: AsyncEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        assert await engine.call(lambda e: e.max_model_len) == 256
        with pytest.raises(KeyError):
            await engine.call(lambda e: {}["nothing"])

    run(shared, scenario)


def test_several_completions_and_text_in_a_stream(shared: AsyncEngine) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        sampling = SamplingParams(n=3, temperature=1.0, seed=2, max_tokens=10, ignore_eos=True)
        output = await last(engine.generate("a prompt", sampling, request_id="three"))
        assert len(output.outputs) == 3 and all(len(c.token_ids) == 10 and c.finished for c in output.outputs)
        assert output.times.arrival is not None and output.times.first_scheduled is not None
        assert output.times.arrival <= output.times.first_scheduled <= (output.times.first_token or 0)

    run(shared, scenario)
