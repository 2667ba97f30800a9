"""A scheduler with a runner that answers every sampling row with the next token of a fixed kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dougong.kv import GroupSpec, KVCacheManager
from dougong.scheduling import Request, Scheduler, SchedulerConfig, StepPlan, TokenEvent
from dougong.types import SamplingParams


class Toy:
    """``toy.step()`` schedules and commits one plan in which every row samples ``toy.token``."""

    def __init__(
        self,
        blocks: int = 65,
        size: int = 4,
        *,
        caching: bool = True,
        groups: Sequence[GroupSpec] | None = None,
        **config: object,
    ) -> None:
        specs = groups or [GroupSpec(block_size=size, num_blocks=blocks)]
        self.kv = KVCacheManager(specs, enable_prefix_caching=caching)
        options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64, **config}
        self.scheduler = Scheduler(SchedulerConfig(**options), self.kv)  # type: ignore[arg-type]
        self.token = 7

    def add(self, name: str, prompt: int | Sequence[int], **options: object) -> Request:
        """A request of ``prompt`` distinct tokens, unlike any other's, or of the given ones."""
        own = {k: options.pop(k) for k in list(options) if k in _REQUEST_OPTIONS}
        tokens = list(prompt) if not isinstance(prompt, int) else [1000 * len(name) + ord(name[0])] * prompt
        if isinstance(prompt, int):
            tokens = [tokens[0] + 13 * i for i in range(prompt)]
        sampling = SamplingParams(**{"max_tokens": 4, **options})  # type: ignore[arg-type]
        request = Request(name, tokens, sampling, **own)  # type: ignore[arg-type]
        self.scheduler.add(request)
        return request

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, token: int | None = None) -> list[TokenEvent]:
        events = self.scheduler.commit(plan, [self.token if token is None else token] * plan.num_rows)
        self.scheduler.check_integrity()
        return events

    def step(self) -> StepPlan:
        plan = self.plan()
        self.commit(plan)
        return plan

    def drain(self, steps: int = 500) -> None:
        for _ in range(steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        self.scheduler.check_integrity()
        assert all(g.pool.num_free == g.pool.num_usable for g in self.kv.groups)


_REQUEST_OPTIONS = {
    "eos_token_ids",
    "priority",
    "arrival",
    "adapter",
    "cache_salt",
    "multimodal",
    "parent",
    "requires_commit",
}


@pytest.fixture
def toy() -> Callable[..., Toy]:
    return Toy


def rows(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [
        (r.request_id, start, count, samples)
        for r, start, count, samples in zip(plan.requests, plan.starts, plan.num_tokens, plan.samples)
    ]


@pytest.fixture(name="rows")
def rows_fixture() -> Callable[[StepPlan], list[tuple[str, int, int, bool]]]:
    return rows
