"""``--scheduling-policy priority`` as clients see it: the lower number goes first, whoever came first."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import served

pytestmark = pytest.mark.prove


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_urgent_requests_go_before_those_that_wait(tiny_model: Path, path: str) -> None:
    with served(tiny_model, {"scheduling_policy": "priority", "max_num_seqs": 1}) as server:
        ends: list[str] = []

        async def one(client: httpx.AsyncClient, name: str, priority: int, tokens: int = 4) -> None:
            text: Any = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
            body = text | {"max_tokens": tokens, "ignore_eos": True, "priority": priority, "request_id": name}
            answer = await client.post(f"{server.url}/v1/{path}", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            ends.append(name)

        async def work() -> None:
            async with httpx.AsyncClient() as client:
                tasks = [asyncio.ensure_future(one(client, "first", -10, 400))]
                for count, (name, priority) in enumerate((("late", 5), ("middle", 0), ("urgent", -5)), 2):
                    while server.client.num_completions < count - 1:
                        await asyncio.sleep(0.002)
                    tasks.append(asyncio.ensure_future(one(client, name, priority)))
                await asyncio.gather(*tasks)

        asyncio.run(work())
        assert ends == ["first", "urgent", "middle", "late"]
