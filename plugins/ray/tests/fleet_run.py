"""Run by test_fleet.py in an environment that has Ray: a fleet, load, a kill, a rolling update. Prints JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import httpx
import ray
from dougong_ray import FleetClient, FleetConfig, start_fleet
from dougong_ray.serve import fleet_app
from ray import serve

from dougong.config import EngineConfig
from dougong.server.config import ServerConfig
from dougong.types import RequestOutput, SamplingParams

ENGINE = {"model": "smollm2-135m", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "num_kv_blocks": 160}
SHARED = list(range(1000, 1048))
PROMPTS = [[*SHARED, 500 + i, 11 + i] if i % 2 else [2000 + 7 * i + j for j in range(24)] for i in range(10)]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
PENALISED = SamplingParams(max_tokens=24, temperature=0, presence_penalty=0.7, ignore_eos=True)
PARAMS = [GREEDY, GREEDY, SEEDED, PENALISED, GREEDY]


async def ask(client: FleetClient, name: str, index: int, progress: list[int]) -> RequestOutput:
    output: RequestOutput | None = None
    async for output in client.generate(PROMPTS[index], PARAMS[index % len(PARAMS)], request_id=f"{name}-{index}"):
        progress[index] = len(output.outputs[0].token_ids)
    assert output is not None
    return output


async def ask_all(client: FleetClient, name: str, disturb: Any = None) -> dict[str, Any]:
    progress = [0] * len(PROMPTS)
    tasks = [asyncio.create_task(ask(client, name, i, progress)) for i in range(len(PROMPTS))]
    streamed = 0
    if disturb is not None:
        while min(progress[:8]) < 3:  # every request that runs has streamed some tokens
            await asyncio.sleep(0.01)
        streamed = sum(0 < count < 24 for count in progress)
        await disturb()
    outputs = await asyncio.gather(*tasks)
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in outputs],
        "texts": [one.outputs[0].text for one in outputs],
        "reasons": [one.outputs[0].finish_reason and one.outputs[0].finish_reason.value for one in outputs],
        "errors": [one.outputs[0].error for one in outputs],
        "streamed": streamed,
    }


async def replicas(handle: Any, count: int) -> dict[int, str]:
    """Process id to backend of every replica."""
    found: dict[int, str] = {}
    for _ in range(600):
        answer = await handle.info.remote()
        found[answer["pid"]] = answer["info"].backend
        if len(found) == count:
            break
        await asyncio.sleep(0.05)
    return found


async def main() -> dict[str, Any]:
    config = FleetConfig(engine=ENGINE, backends=("cpu", "cpu"), health_check_period_s=1.0, drain_s=20.0)
    handle = await asyncio.to_thread(start_fleet, config)
    client = await FleetClient.start(config, handle)
    result: dict[str, Any] = {"undisturbed": await ask_all(client, "calm")}
    again = [one async for one in client.generate(PROMPTS[1], GREEDY, request_id="again")][-1]
    result["cached"] = again.num_cached_tokens

    before = await replicas(handle, 2)
    victim = next(iter(before))

    async def kill() -> None:
        os.kill(victim, signal.SIGKILL)

    result["killed"] = await ask_all(client, "kill", kill)
    result["lost"] = client.restarts
    after = await replicas(handle, 2)
    result["replaced"] = victim not in after and len(after) == 2

    transport = httpx.ASGITransport(app=fleet_app(ServerConfig(engine=EngineConfig(**ENGINE), web=False), client))
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as http:
        answer = await http.post(
            "/v1/completions",
            json={"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
            timeout=60,
        )
        result["http"] = [answer.status_code, answer.json()]

    mixed = FleetConfig(engine=ENGINE, backends=("cpu", "sim"), health_check_period_s=1.0, drain_s=20.0)
    update = asyncio.create_task(asyncio.to_thread(start_fleet, mixed))

    async def wait() -> None:
        await asyncio.sleep(0.1)

    result["updated"] = await ask_all(client, "update", wait)
    await update
    found: dict[int, str] = {}
    for _ in range(60):
        found = await replicas(handle, 2)
        if not set(found) & set(after):
            break
        await asyncio.sleep(0.5)
    result["mixed"] = sorted(found.values())
    result["new"] = not set(found) & set(after)
    await client.close()
    return result


if __name__ == "__main__":
    ray.init(
        num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        answer = asyncio.run(main())
        print("RESULT " + json.dumps(answer))
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.exit(0)
