"""The engine's process loses its device: its requests say why, it ends by itself, and the next one serves."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from dougong import EngineConfig, SamplingParams
from dougong.server.process.client import EngineClient
from dougong.types import FinishReason, RequestOutput

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.prove]

#: A plugin of the engine's process, whose device fails as soon as a file is there. It takes the file away: the process
#: after it has a device that works.
BREAKER = """
import os

from dougong.execution.runner import ModelRunner
from dougong.plugins import hookimpl

FILE = {file!r}
execute = ModelRunner.execute


def lost(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def break_if_told(self, plan):
    if os.path.exists(FILE):
        os.unlink(FILE)
        self.backend.device.synchronize = lost
        lost()
    return execute(self, plan)


@hookimpl
def dougong_observers():
    ModelRunner.execute = break_if_told
    return []
"""


def install(folder: Path, trigger: Path) -> None:
    """A distribution with the plugin, as pip would leave it."""
    (folder / "breaker.py").write_text(BREAKER.format(file=str(trigger)))
    record = folder / "breaker-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: breaker\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[dougong]\nbreaker = breaker\n")


def test_a_lost_device_ends_the_process_and_its_requests_with_the_cause(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trigger = tmp_path / "now"
    site = tmp_path / "site"
    site.mkdir()
    install(site, trigger)
    monkeypatch.setenv("PYTHONPATH", str(site))
    config = EngineConfig(model=str(tiny_model), backend="cpu", num_kv_blocks=64, max_num_seqs=2)
    long = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)

    async def run(client: EngineClient, name: str, params: SamplingParams, begun: asyncio.Event) -> RequestOutput:
        final = None
        async for output in client.generate([5, 6], params, request_id=name):
            final = output
            begun.set()
        assert final is not None
        return final

    async def scenario() -> tuple[list[RequestOutput], RequestOutput, int, int | None, int | None]:
        client = await EngineClient.start(config)
        try:
            first, begun = client.info.pid, asyncio.Event()
            tasks = [asyncio.create_task(run(client, f"r{i}", long, begun)) for i in range(4)]  # two run, two wait
            await begun.wait()
            trigger.touch()
            lost = await asyncio.gather(*tasks)
            after = await run(client, "after", SamplingParams(max_tokens=3, temperature=0), asyncio.Event())
            return lost, after, client.restarts, first, client.info.pid
        finally:
            await client.close()

    with caplog.at_level(logging.ERROR):
        lost, after, restarts, first, second = asyncio.run(asyncio.wait_for(scenario(), 120))
    assert len(lost) == 4 and not trigger.exists()
    for output in lost:
        (one,) = output.outputs
        assert one.finish_reason is FinishReason.ERROR
        assert "DeviceLostError" in str(one.error) and "illegal memory access" in str(one.error)
    assert len(after.outputs[0].token_ids) == 3 and after.outputs[0].error is None
    assert restarts == 1 and first != second
    assert any("DeviceLostError" in record.getMessage() for record in caplog.records)
