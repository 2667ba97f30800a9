"""The engine as it stands, read between two steps on the engine's thread."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from dougong.server.process.messages import (
    MAX_LISTED,
    BlockMap,
    EngineInfo,
    EngineSnapshot,
    KernelInfo,
    RequestState,
    StepCounters,
    StepTimes,
)

if TYPE_CHECKING:
    from dougong.engine import Engine
    from dougong.hal import Choice
    from dougong.kv import BlockPool
    from dougong.scheduling import Request
    from dougong.types import RequestTimes

__all__ = ["SnapshotReader", "engine_info"]

#: Steps kept for `EngineSnapshot.recent_steps`, and the time over which tokens per second are counted.
_RECENT_STEPS = 200
_RATE_S = 3.0


def engine_info(engine: Engine, started: float, pid: int) -> EngineInfo:
    """What is fixed once ``engine`` stands. ``started``: of the process, on ``time.monotonic()``'s clock."""
    from dougong import __version__

    runner, model = engine.runner, engine.runner.model_config
    capacity = engine.kv.capacity_tokens
    return EngineInfo(
        version=__version__,
        pid=pid,
        model_path=str(engine.model_path),
        model_type=model.model_type,
        dtype=str(runner.model.dtype).removeprefix("torch."),
        quantization=engine.config.quantization,
        vocab_size=model.vocab_size,
        max_model_len=engine.max_model_len,
        capacity_tokens=capacity if capacity < 1 << 53 else None,
        eos_token_ids=sorted(engine.eos_token_ids),
        max_num_seqs=runner.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
        backend=runner.backend.name,
        device=runner.backend.device.name,
        hidden_size=model.hidden_size,
        usable_blocks=sum(group.pool.num_usable for group in engine.kv.groups),
        kernels=[_kernel(name, choice) for name, choice in runner.choices.items()],
        start_s=time.monotonic() - started,
    )


def _kernel(name: str, choice: Choice) -> KernelInfo:
    refused = [(candidate.label, reason) for candidate, reason in choice.refused]
    return KernelInfo(name, choice.spec.provider, choice.candidate.plugin, refused)


class SnapshotReader:
    """Keeps the recent steps and makes snapshots."""

    def __init__(self, engine: Engine, pid: int) -> None:
        self._engine = engine
        self._pid = pid
        self._born = time.monotonic()
        self._steps: deque[StepTimes] = deque(maxlen=_RECENT_STEPS)
        self._generated: deque[tuple[float, int]] = deque([(self._born, 0)])

    def step(self, counters: StepCounters) -> None:
        """Remember a step."""
        self._steps.append(
            StepTimes(
                counters.index, counters.num_rows, counters.num_tokens, counters.schedule_s, counters.launch_s,
                counters.wait_s, counters.commit_s, counters.cpu_s,
            )
        )  # fmt: skip

    def read(self) -> EngineSnapshot:
        """O(requests + blocks): only made while somebody looks."""
        engine, now = self._engine, time.monotonic()
        stats, scheduler, kv = engine.stats, engine.scheduler, engine.kv.stats()
        running, waiting = scheduler.running(), scheduler.waiting()
        return EngineSnapshot(
            time=time.time(),
            uptime_s=now - self._born,
            pid=self._pid,
            steps=stats.steps,
            running=[self._request(request, now) for request in running[:MAX_LISTED]],
            waiting=[self._request(request, now) for request in waiting[:MAX_LISTED]],
            num_running=len(running),
            num_waiting=len(waiting),
            blocks=[
                BlockMap(
                    block_size=group.block_size,
                    window=group.window,
                    scratch_blocks=group.pool.num_scratch_blocks,
                    states=_states(group.pool),
                    ref_counts=bytes(min(count, 255) for count in group.pool.ref_counts),
                )
                for group in engine.kv.groups
            ],
            kv_usage=kv.usage,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            generated_tokens=stats.generated_tokens,
            computed_tokens=stats.computed_tokens,
            preemptions=stats.preemptions,
            prefix_queries=kv.prefix_queries,
            prefix_hits=kv.prefix_hits,
            evictions=kv.evictions,
            finished=dict(stats.finished),
            tokens_per_s=self._rate(now, stats.generated_tokens),
            cpu_s=time.process_time(),
            recent_steps=list(self._steps),
        )

    def _rate(self, now: float, generated: int) -> float:
        past = self._generated
        past.append((now, generated))
        while len(past) > 2 and past[1][0] < now - _RATE_S:
            past.popleft()
        then, before = past[0]
        return (generated - before) / max(now - then, 1e-3)

    def _request(self, request: Request, now: float) -> RequestState:
        times = self._engine.times_of(request)
        return RequestState(
            request_id=request.request_id,
            status=request.status.value,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=request.num_cached_tokens,
            output_tokens=len(request.output_token_ids),
            computed_tokens=request.num_computed,
            max_tokens=request.sampling.max_tokens,
            priority=request.priority,
            preemptions=request.num_preemptions,
            age_s=_since(times, "arrival", now) or 0.0,
            running_s=_since(times, "first_scheduled", now),
            first_token_s=_first_token(times),
            blocks=[table[:] for table in request.block_ids],
        )


def _since(times: RequestTimes | None, name: str, now: float) -> float | None:
    at: float | None = getattr(times, name) if times is not None else None
    return None if at is None else now - at


def _first_token(times: RequestTimes | None) -> float | None:
    if times is None or times.first_token is None or times.arrival is None:
        return None
    return times.first_token - times.arrival


def _states(pool: BlockPool) -> bytes:
    """A byte per block (see `BlockMap.states`)."""
    cached = pool.cached_blocks()
    return bytes((2 if count else 0) | (block in cached) for block, count in enumerate(pool.ref_counts))
