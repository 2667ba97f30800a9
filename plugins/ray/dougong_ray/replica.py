"""One engine of the fleet: a Serve deployment that speaks of tokens only."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from dougong_ray.config import FleetConfig

__all__ = ["EngineReplica"]


class EngineReplica:
    """Ray makes one per replica. ``generate`` streams what is new since the last item."""

    def __init__(self, config: FleetConfig) -> None:
        from ray import serve

        from dougong import AsyncEngine

        self._started = time.monotonic()
        rank = serve.get_replica_context().rank
        rank = int(getattr(rank, "rank", rank))
        self._engine = AsyncEngine(skip_tokenizer_init=True, **config.engine_options(rank))
        self._timeout = config.health_check_timeout_s / 2

    async def generate(self, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """``job``: request_id, prompt_token_ids, params (one completion), priority.

        Yields dicts: tokens (ids since the last), logprobs, prompt_logprobs and cached (with the first), embedding, and
        finish, stop_reason and error with the last.
        """
        sent = 0
        prompt: Any = {"prompt_token_ids": job["prompt_token_ids"]}
        if job.get("cache_salt") is not None:
            prompt["cache_salt"] = job["cache_salt"]
        async for output in self._engine.generate(
            prompt, job["params"], request_id=job["request_id"], priority=job["priority"]
        ):
            done = output.outputs[0]
            tokens = list(done.token_ids[sent:])
            part: dict[str, Any] = {"tokens": tokens}
            if done.logprobs is not None:
                part["logprobs"] = done.logprobs[sent : sent + len(tokens)]
            if not sent:
                part["cached"] = output.num_cached_tokens
                part["prompt_logprobs"] = output.prompt_logprobs
            sent += len(tokens)
            if output.finished:
                part |= {
                    "finish": None if done.finish_reason is None else done.finish_reason.value,
                    "stop_reason": done.stop_reason,
                    "error": done.error,
                    "embedding": output.embedding,
                }
            if tokens or output.finished:
                yield part

    async def info(self) -> dict[str, Any]:
        """What is fixed: the server's EngineInfo."""
        from dougong.server.process.snapshot import engine_info

        return {
            "info": await self._engine.call(lambda engine: engine_info(engine, self._started, os.getpid())),
            "pid": os.getpid(),
        }

    async def check_health(self) -> None:
        """Raises: the engine's thread has ended, or does not come to the end of a step. Ray then replaces this one."""
        await asyncio.wait_for(self._engine.call(lambda engine: None), self._timeout)
