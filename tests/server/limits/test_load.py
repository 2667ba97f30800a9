"""Many streams at once, and requests made at random from the API's own description."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_harness import Served, served

from dougong import LLM, SamplingParams
from dougong.server.process.messages import StepCounters
from dougong.server.process.observer import RequestObserver

pytestmark = pytest.mark.prove


async def stream(port: int, body: Any) -> str:
    """The text of a streamed completion, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body | {"stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(data) + data
    )
    text = ""
    done = False
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["text"]
    writer.close()
    assert done
    return text


def test_a_thousand_streams_at_once_none_lost_none_mixed_up(tiny_model: Path) -> None:
    prompts = [f"stream number {i}" for i in range(1000)]
    options: Any = {"backend": "cpu", "num_kv_blocks": 512, "max_num_seqs": 64}
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with LLM(str(tiny_model), **options) as llm:
        wanted = [output.outputs[0].text for output in llm.generate(prompts, sampling, use_tqdm=False)]
    assert len(set(wanted)) > 200
    with served(tiny_model, engine=options) as server:

        async def load() -> list[str]:
            body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
            return await asyncio.gather(*(stream(server.port, body | {"prompt": prompt}) for prompt in prompts))

        assert asyncio.run(load()) == wanted


class Costs(RequestObserver):
    """Adds up processor time of steps whose rows are all decodes."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []

    def step(self, counters: StepCounters) -> None:
        if counters.num_rows == counters.num_decode_rows == 8:
            self.cpu_s.append(counters.cpu_s)

    def typical(self) -> float:
        """The median: what a step costs when nothing else happens to the machine."""
        return sorted(self.cpu_s)[len(self.cpu_s) // 2]


def cost_of(server: Served, count: int, tokens: int) -> float:
    costs = Costs()
    server.client.observers.append(costs)

    async def load() -> None:
        body = {"prompt": "ab", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        await asyncio.gather(*(stream(server.port, body) for _ in range(count)))

    asyncio.run(load())
    server.client.observers.remove(costs)
    return costs.typical()


def test_open_streams_cost_the_engines_step_nothing(tiny_model: Path) -> None:
    with served(tiny_model, engine={"max_num_seqs": 8}) as server:
        cost_of(server, 8, 50)  # the first steps of a process are slower
        few = min(cost_of(server, 8, 300) for _ in range(2))
        many = cost_of(server, 1000, 16)
        print(f"processor time per step: {1e6 * few:.0f} us with 8 streams, {1e6 * many:.0f} us with 1,000")
        assert many <= 1.10 * few


def test_random_requests_made_from_the_description_never_crash_the_server(tiny_model: Path) -> None:
    with served(tiny_model) as server:
        command = [
            str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json",
            "--checks", "not_a_server_error", "--max-examples", "40", "--request-timeout", "60",
            "--exclude-path-regex", "^/web", "--seed", "1",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
