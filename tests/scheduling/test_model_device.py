"""The scheduler against a device that knows what every KV slot should hold.

The device keeps, per slot, a fingerprint of the whole token history behind it. Each computed position is checked
to see exactly its own history, in its own blocks, and what it samples is a function of that history, so any wrong
sharing, hashing, copying, freeing or scheduling shows as a wrong fingerprint or a wrong token.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dougong.kv import GroupSpec, KVCacheManager
from dougong.scheduling import Request, Scheduler, SchedulerConfig, StepPlan
from dougong.types import FinishReason, SamplingParams

EOS = 0
VOCABULARY = 5


def number(value: object) -> int:
    """The same number in every process, unlike hash() of text."""
    return crc32(repr(value).encode())


def fingerprints(tokens: list[int], request: Request) -> list[int]:
    """One number per position, of all tokens up to it and of whatever else changes KV."""
    out, link = [], number((request.adapter, request.cache_salt))
    content = {
        span.position + offset: number((span.hash, offset))
        for span in request.multimodal
        for offset in range(span.length)
    }
    for position, token in enumerate(tokens):
        link = hash((link, token, content.get(position, 0)))
        out.append(link)
    return out


def sample(fingerprint: int, request_id: str) -> int:
    return hash((fingerprint, number(request_id))) // 7 % VOCABULARY


def expected_output(request: Request, max_len: int) -> list[int]:
    """What the request must produce, computed without any cache."""
    tokens = list(request.prompt_token_ids)
    out: list[int] = []
    while len(tokens) < max_len and len(out) < (request.sampling.max_tokens or max_len):
        token = sample(fingerprints(tokens, request)[-1], request.request_id)
        tokens.append(token)
        out.append(token)
        if token in request.stop_ids and len(out) >= request.sampling.min_tokens:
            break
    return out


@dataclass
class Seat:
    request: Request
    tokens: list[int]
    tables: list[list[int]]


@dataclass
class ModelDevice:
    """Runs plans at once and in order, from what plans say alone: it looks into no request after its admission."""

    kv: KVCacheManager
    seats: dict[int, Seat] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    """(group, slot) -> fingerprint."""
    last_rows: list[Request] | None = None
    last_starts: list[int] = field(default_factory=list)

    def run(self, plan: StepPlan) -> list[int | None]:
        self._apply(plan)
        assert plan.total_tokens == sum(plan.num_tokens)
        assert len({id(r) for r in plan.requests}) == plan.num_rows
        if not plan.rows_changed:
            assert plan.requests == self.last_rows
            assert plan.starts == [start + 1 for start in self.last_starts]
        self.last_rows, self.last_starts = list(plan.requests), list(plan.starts)
        writers: dict[tuple[int, int], Request] = {}
        for request, start, count in zip(plan.requests, plan.starts, plan.num_tokens):
            self._write(request, start, count, writers)
        self._check_owners(writers)
        out: list[int | None] = []
        for row, (request, start, count) in enumerate(zip(plan.requests, plan.starts, plan.num_tokens)):
            assert count > 0
            assert row >= plan.num_decode_rows or (count == 1 and plan.samples[row])
            seen = self._read(request, start, count)
            if not plan.samples[row]:
                out.append(None)
                continue
            token = sample(seen, request.request_id)
            seat = self.seats[request.batch_index]
            assert len(seat.tokens) == start + count, "a row samples only after its last known token"
            seat.tokens.append(token)
            out.append(token)
        return out

    def _apply(self, plan: StepPlan) -> None:
        for seat in plan.released:
            self.seats.pop(seat, None)
        for request in plan.admitted:
            assert request.batch_index not in self.seats, "two requests in one seat"
            tokens = request.prompt_token_ids + request.output_token_ids
            self.seats[request.batch_index] = Seat(request, tokens, [[] for _ in self.kv.groups])
        for seat, group, first, ids in plan.new_blocks:
            table = self.seats[seat].tables[group]
            assert first <= len(table), "a gap in a block table"
            table[first : first + len(ids)] = ids
        sources = {(copy.group, copy.src) for copy in plan.copies}
        targets = [(copy.group, copy.dst) for copy in plan.copies]
        assert len(set(targets)) == len(targets)
        assert not sources & set(targets)
        for group, src, dst in plan.copies:
            size = self.kv.groups[group].block_size
            for place in range(size):
                content = self.slots.pop((group, dst * size + place), None)
                content = self.slots.get((group, src * size + place))
                if content is not None:
                    self.slots[group, dst * size + place] = content

    def _write(self, request: Request, start: int, count: int, writers: dict[tuple[int, int], Request]) -> None:
        seat = self.seats[request.batch_index]
        assert seat.request is request
        assert len(seat.tokens) >= start + count, "the input token is on neither host nor device"
        history = fingerprints(seat.tokens[: start + count], request)
        for group in self.kv.groups:
            size = group.block_size
            for position in range(start, start + count):
                block = seat.tables[group.index][position // size]
                assert block >= group.pool.num_scratch_blocks, "a write to a scratch block"
                assert writers.setdefault((group.index, block), request) is request, "two rows write one block"
                self.slots[group.index, block * size + position % size] = history[position]

    def _check_owners(self, writers: dict[tuple[int, int], Request]) -> None:
        """Nobody else may hold a block that is written in this step."""
        for group in self.kv.groups:
            for seat in self.seats.values():
                for block in seat.tables[group.index]:
                    writer = writers.get((group.index, block))
                    assert writer is None or writer is seat.request, "a shared block is written"

    def _read(self, request: Request, start: int, count: int) -> int:
        seat = self.seats[request.batch_index]
        history = fingerprints(seat.tokens[: start + count], request)
        for group in self.kv.groups:
            size, window = group.block_size, group.window
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, start + count):
                block = seat.tables[group.index][position // size]
                assert block, f"position {position} was freed while visible"
                found = self.slots.get((group.index, block * size + position % size))
                assert found == history[position], f"group {group.index} position {position}: another's KV"
        return history[-1]


class World:
    """Scheduler and device together, with plans committed ``lag`` steps late."""

    def __init__(self, groups: list[GroupSpec], lag: int, caching: bool, **config: object) -> None:
        self.kv = KVCacheManager(groups, enable_prefix_caching=caching)
        self.config = SchedulerConfig(**config)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.config, self.kv)
        self.device = ModelDevice(self.kv)
        self.lag = lag
        self.launched: deque[tuple[StepPlan, list[int | None]]] = deque()
        self.requests: list[Request] = []
        self.ended: dict[str, FinishReason] = {}
        self.streams: dict[str, list[int]] = {}

    @property
    def most_tokens(self) -> int:
        """Tokens of one request that fit: without chunks a window's blocks are freed too late to help."""
        whole = self.kv.capacity_tokens if self.config.enable_chunked_prefill else self.kv.one_step_capacity_tokens
        return min(whole + 1, self.config.max_model_len)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests.append(request)
        self.streams[request.request_id] = []

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.total_tokens <= self.config.max_num_batched_tokens
            assert plan.num_rows <= self.config.max_num_seqs
            for request in plan.requests:
                waiting_for_commit = any(
                    request in p.requests and p.samples[p.requests.index(request)] for p, _ in self.launched
                )
                assert not (request.requires_commit and waiting_for_commit)
            self.launched.append((plan, self.device.run(plan)))
        if self.launched and (plan is None or len(self.launched) > self.lag):
            self.commit()

    def commit(self) -> None:
        plan, sampled = self.launched.popleft()
        for request, token, reason in self.scheduler.commit(plan, sampled):
            assert request.request_id not in self.ended, "a token after the end"
            assert token is not None
            self.streams[request.request_id].append(token)
            if reason is not None:
                self.ended[request.request_id] = reason

    def drain(self) -> None:
        work = sum(len(r.prompt_token_ids) + self.config.max_model_len for r in self.requests) + 10
        bound = work * (len(self.requests) + 2)
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"work left after {bound} steps: {self.scheduler.stats()}"

    def check(self) -> None:
        self.scheduler.check_integrity()
        for group in self.kv.groups:
            for request in self.scheduler.running():
                held = len(request.block_ids[group.index])
                # Waste: at most the last block (a token not scheduled yet may be the reason for none at all).
                assert held <= group.blocks_for(max(request.num_computed, 1))

    def check_end(self) -> None:
        self.scheduler.check_integrity()
        assert all(g.pool.num_free == g.pool.num_usable for g in self.kv.groups), "blocks leaked"
        for request in self.requests:
            assert request.is_finished
            want = expected_output(request, self.most_tokens)
            got = request.output_token_ids
            assert got == self.streams[request.request_id]
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert got == want
                assert request.finish_reason == (
                    FinishReason.STOP
                    if want[-1] in request.stop_ids and len(want) >= request.sampling.min_tokens
                    else FinishReason.LENGTH
                )
            else:
                assert got == want[: len(got)]


GROUPS = {
    "full": lambda n: [GroupSpec(block_size=4, num_blocks=n)],
    "one-token blocks": lambda n: [GroupSpec(block_size=1, num_blocks=4 * n)],
    "full and window": lambda n: [
        GroupSpec(block_size=4, num_blocks=n),
        GroupSpec(block_size=4, num_blocks=max(5, n // 2), window=6, num_scratch_blocks=2),
    ],
    "two sizes": lambda n: [
        GroupSpec(block_size=2, num_blocks=2 * n),
        GroupSpec(block_size=4, num_blocks=n),
        GroupSpec(block_size=2, num_blocks=n, window=3),
    ],
    "window only": lambda n: [GroupSpec(block_size=4, num_blocks=max(4, n // 2), window=5)],
}


@st.composite
def worlds(draw: st.DrawFn) -> World:
    chunked = draw(st.booleans())
    seqs = draw(st.integers(1, 5))
    max_len = draw(st.sampled_from([16, 30]))
    budget = max(seqs, draw(st.integers(1, 24))) if chunked else max_len + draw(st.integers(0, 8))
    return World(
        GROUPS[draw(st.sampled_from(sorted(GROUPS)))](draw(st.integers(6, 16))),
        draw(st.integers(0, 2)),
        draw(st.booleans()),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_len,
        enable_chunked_prefill=chunked,
        long_prefill_threshold=draw(st.sampled_from([None, 1, 3, 7])) if chunked else None,
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        priority_aging_steps=draw(st.sampled_from([None, 1, 20])),
        watermark=draw(st.sampled_from([0.0, 0.2])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.world: World | None = None

    @initialize(world=worlds())
    def begin(self, world: World) -> None:
        self.world = world

    @rule(
        data=st.data(),
        stem=st.integers(0, 2),
        length=st.integers(0, 14),
        tail=st.lists(st.integers(1, 2), min_size=1, max_size=3),
        samples=st.integers(1, 3),
    )
    def add(self, data: st.DataObject, stem: int, length: int, tail: list[int], samples: int) -> None:
        assert self.world is not None
        limit = min(self.world.config.max_model_len - 1, 15)
        prompt = ([stem, 1, 2, 3] * 4)[:length] + tail
        prompt = prompt[-limit:]
        room = self.world.most_tokens - len(prompt)  # what never fits is refused, which other tests see to
        if room < 1:
            return
        spans = (
            [(1, 2, data.draw(st.sampled_from([b"x", b"y"])))] if len(prompt) > 4 and data.draw(st.booleans()) else []
        )
        first = Request(
            f"r{self.count}",
            prompt,
            SamplingParams(
                max_tokens=data.draw(st.one_of(st.none(), st.integers(1, min(room, 12)))),
                min_tokens=0,
                ignore_eos=data.draw(st.booleans()),
                prompt_logprobs=data.draw(st.sampled_from([None, None, 1])),
            ),
            eos_token_ids=[EOS],
            priority=data.draw(st.integers(-1, 1)),
            adapter=data.draw(st.sampled_from([None, None, "lora"])),
            cache_salt=data.draw(st.sampled_from([None, None, "salt"])),
            multimodal=spans,
            requires_commit=data.draw(st.sampled_from([False, False, True])),
        )
        self.world.add(first)
        for n in range(1, samples):
            self.world.add(first.sibling(f"r{self.count}.{n}"))
        self.count += 1

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        assert self.world is not None
        for _ in range(times):
            self.world.step()
            self.world.check()

    @precondition(lambda self: self.world is not None and self.world.launched)
    @rule()
    def commit(self) -> None:
        assert self.world is not None
        self.world.commit()

    @precondition(lambda self: self.world is not None and self.world.scheduler.has_unfinished)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        assert self.world is not None
        alive = [r for r in self.world.requests if not r.is_finished]
        request = data.draw(st.sampled_from(alive))
        assert self.world.scheduler.finish(request.request_id, reason) is request
        assert self.world.scheduler.abort(request.request_id) is None
        self.world.ended[request.request_id] = reason

    @rule()
    def forget(self) -> None:
        assert self.world is not None
        self.world.kv.reset_prefix_cache()

    @invariant()
    def books_are_right(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.drain()
            self.world.check_end()


SchedulerMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerMachine = SchedulerMachine.TestCase


def random_world(seed: int) -> World:
    """A longer mixed load than the state machine reaches: many requests, a pool too small for them."""
    rng = random.Random(seed)
    chunked = rng.random() < 0.8
    seqs = rng.choice([1, 2, 4, 8])
    world = World(
        GROUPS[rng.choice(sorted(GROUPS))](rng.randint(9, 24)),
        rng.randint(0, 2),
        rng.random() < 0.7,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, rng.choice([1, 7, 16, 64])) if chunked else 40,
        max_model_len=32,
        enable_chunked_prefill=chunked,
        long_prefill_threshold=rng.choice([None, 1, 5]) if chunked else None,
        policy=rng.choice(["fcfs", "priority"]),
        priority_aging_steps=rng.choice([None, 10]),
    )
    stems = [[rng.randrange(VOCABULARY) for _ in range(16)] for _ in range(3)]
    for number in range(30):
        prompt = rng.choice(stems)[: rng.randint(0, 16)] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
        room = world.most_tokens - len(prompt)
        if room < 1:
            continue
        first = Request(
            f"r{number}",
            prompt,
            SamplingParams(max_tokens=rng.choice([None, rng.randint(1, room)]), ignore_eos=rng.random() < 0.5),
            eos_token_ids=[EOS],
            priority=rng.randint(0, 2),
            requires_commit=rng.random() < 0.2,
        )
        world.add(first)
        for n in range(1, rng.choice([1, 1, 2, 4])):
            world.add(first.sibling(f"r{number}.{n}"))
        for _ in range(rng.randint(0, 4)):
            world.step()
        if rng.random() < 0.1:
            victim = rng.choice(world.requests)
            if world.scheduler.abort(victim.request_id) is not None:
                world.ended[victim.request_id] = FinishReason.ABORT
        world.check()
    return world


@pytest.mark.parametrize("seed", range(60))
def test_random_load(seed: int) -> None:
    world = random_world(seed)
    world.drain()
    world.check_end()


@pytest.mark.prove
@pytest.mark.parametrize("block", range(20))
def test_random_load_at_length(block: int) -> None:
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        world = random_world(seed)
        world.drain()
        world.check_end()


def test_random_load_reaches_what_it_should() -> None:
    """The seeds above do preempt, share, copy and hit; otherwise they would prove little."""
    preempted = hits = finished = 0
    for seed in range(12):
        world = random_world(seed)
        world.drain()
        stats = world.scheduler.stats()
        preempted += stats.total_preemptions
        hits += stats.kv.prefix_hits
        finished += sum(stats.total_finished.values())
    assert preempted > 20
    assert hits > 200
    assert finished > 200
