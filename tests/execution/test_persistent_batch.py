"""The persistent batch against a model that remembers everything, under random plans."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from execution_harness import HostDevice, request
from hypothesis import given, settings
from hypothesis import strategies as st

from dougong.execution.delta import DeltaReader, StepDelta
from dougong.execution.persistent_batch import PersistentBatch, StagedStep
from dougong.execution.runner import _resolve
from dougong.hal import NHD, AttentionSpec, KVGroup
from dougong.scheduling import Request, StepPlan

ROWS, LEN = 5, 40
SCRATCH = 4


def groups() -> tuple[KVGroup, ...]:
    """Blocks of 4 as the kernel sees them too, and blocks of 8 that the kernel sees as pairs of 4."""
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16)
    return tuple(
        KVGroup(index=i, layers=(i,), spec=spec, layout=NHD, manager_block=size, kernel_block=4)
        for i, size in enumerate((4, 8))
    )


class World:
    """Requests, their tokens and blocks, and the plans that change them."""

    def __init__(self, seed: int, in_place: bool) -> None:
        self.rng = random.Random(seed)
        self.groups = groups()
        self.batch = PersistentBatch(
            self.groups, HostDevice(), max_rows=ROWS, max_tokens=64, max_len=LEN, num_scratch=(SCRATCH, SCRATCH),
            in_place=in_place,
        )  # fmt: skip
        self.reader = DeltaReader(ROWS, len(self.groups), 0)
        self.running: list[Request] = []
        self.tables: dict[Request, list[list[int]]] = {}
        self.done: dict[Request, int] = {}
        self.free_slots = list(range(ROWS))
        self.released: list[int] = []
        self.index = 0
        self.block = SCRATCH
        self.last: list[Request] | None = None

    def plan(self) -> StepPlan | None:
        """A random step; tokens sampled are not committed before two steps later."""
        rng = self.rng
        for one in list(self.running):
            if rng.random() < 0.1 or self.done[one] >= LEN - 6:
                self.running.remove(one)
                self.free_slots.append(one.batch_index)
                self.released.append(one.batch_index)
                self.last = None
        admitted = []
        while self.free_slots and rng.random() < 0.5:
            one = request(f"r{self.index}-{len(admitted)}", [rng.randrange(90) for _ in range(rng.randrange(1, 14))])
            one.batch_index = self.free_slots.pop(rng.randrange(len(self.free_slots)))
            # Part of it may lie in the cache already, which leaves a row of one token that looks like a decode.
            self.done[one] = rng.choice([0, 0, len(one.prompt_token_ids) - 1])
            self.tables[one] = [[], []]
            self.running.append(one)
            admitted.append(one)
        # Whoever is admitted has a row in the same plan, as with the planner.
        chosen = [one for one in self.running if one in admitted or rng.random() < 0.8]
        same = bool(self.last) and not admitted and rng.random() < 0.7
        if same:
            chosen = list(self.last or [])
        if not chosen:
            return None
        decodes = [one for one in chosen if self.done[one] >= len(one.prompt_token_ids) - 1]
        others = [one for one in chosen if one not in decodes]
        if not same:
            rng.shuffle(decodes)
        rows, starts, counts, samples = decodes + others, [], [], []
        updates: list[tuple[int, int, int, list[int]]] = []
        for one in rows:
            left = len(one.prompt_token_ids) - self.done[one]
            count = 1 if one in decodes else rng.randrange(1, left + 1)
            starts.append(self.done[one])
            counts.append(count)
            samples.append(one in decodes or count == left)
            self.done[one] += count
            for g, group in enumerate(self.groups):
                table = self.tables[one][g]
                need = -(-self.done[one] // group.manager_block)
                fresh = list(range(self.block, self.block + need - len(table)))
                self.block += len(fresh)
                if fresh:
                    updates.append((one.batch_index, g, len(table), fresh))
                    table.extend(fresh)
        released, self.released = self.released, []
        plan = StepPlan(
            self.index, rows, starts, counts, samples, len(decodes), sum(counts), not same, admitted, released, updates
        )
        self.index += 1
        self.last = rows if len(decodes) == len(rows) else None
        return plan

    def token(self, one: Request, position: int) -> int:
        """The token at a position: of the prompt, or the one that was sampled for it."""
        prompt = one.prompt_token_ids
        return prompt[position] if position < len(prompt) else 100 + 7 * position + one.batch_index

    def check(self, plan: StepPlan, staged: StagedStep, padding: int) -> None:
        views, batch = staged.views, staged.batch
        ids = _resolve(views.token_ids, self.batch.last_token)
        cu_q, kv_len = batch.cu_q.tolist(), batch.groups[0].kv_len.tolist()
        assert batch.host_cu_q.tolist() == cu_q
        assert cu_q[0] == 0
        assert cu_q[-1] == batch.num_tokens == len(ids) == plan.total_tokens + padding
        place = 0
        for row, one in enumerate(plan.requests):
            count, end = plan.num_tokens[row], plan.starts[row] + plan.num_tokens[row]
            assert cu_q[row + 1] - cu_q[row] == count
            assert kv_len[row] == end <= batch.groups[0].max_kv_len
            assert count <= batch.max_q_len
            for position in range(plan.starts[row], end):
                assert ids[place] == self.token(one, position)
                assert views.positions[place] == position
                for g, group in enumerate(self.groups):
                    block = self.tables[one][g][position // group.manager_block]
                    slot = block * group.manager_block + position % group.manager_block
                    assert batch.groups[g].slots[place] == slot
                    kernel = batch.groups[g].block_table[row, position // group.kernel_block]
                    assert kernel * group.kernel_block + position % group.kernel_block == slot
                place += 1
            for g, group in enumerate(self.groups):  # everything before it is in the table too
                ratio = group.manager_block // group.kernel_block
                expected = [b * ratio + i for b in self.tables[one][g] for i in range(ratio)][: -(-end // 4)]
                assert batch.groups[g].block_table[row, : len(expected)].tolist() == expected
        for view in batch.groups:
            assert len(set(view.slots.tolist())) == batch.num_tokens
            assert view.slots[place:].tolist() == list(range(padding))
            assert view.kv_len.tolist() == kv_len
            assert view.host_kv_len is not None
            assert view.host_kv_len.tolist() == kv_len
        rows = [row for row, wanted in enumerate(plan.samples) if wanted]
        assert staged.num_samples == len(rows)
        assert views.sample_index[: len(rows)].tolist() == [cu_q[row + 1] - 1 for row in rows]
        assert staged.sample_slots.tolist() == [plan.requests[row].batch_index for row in rows]
        assert staged.sample_positions.tolist() == [plan.starts[row] + plan.num_tokens[row] for row in rows]
        for row in rows:  # what the sampler does
            one = plan.requests[row]
            position = plan.starts[row] + plan.num_tokens[row]
            self.batch.last_token[one.batch_index] = self.token(one, position)


@pytest.mark.parametrize("in_place", [True, False])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_random_plans(in_place: bool, seed: int) -> None:
    world = World(seed, in_place)
    for _ in range(25):
        plan = world.plan()
        if plan is None:
            continue
        delta = world.reader.read(plan)
        if plan.num_decode_rows == plan.num_rows:
            rows = world.rng.choice([0, len(plan.requests) + 3])
            staged = world.batch.stage(delta, rows=rows, tokens=rows)
            padding = max(0, rows - len(plan.requests))
        else:
            padding = world.rng.choice([0, 1, 7, SCRATCH * 4])
            rows = len(plan.requests) + 2 if padding else 0
            staged = world.batch.stage(delta, rows=rows, tokens=plan.total_tokens + padding)
        world.check(plan, staged, padding)


def test_a_steady_decode_sends_nothing_but_what_changed() -> None:
    world = World(0, in_place=False)
    one = request("a", [3, 4])
    one.batch_index = 2
    first = StepPlan(
        0, [one], [0], [2], [True], 0, 2, True, admitted=[one], new_blocks=[(2, 0, 0, [9]), (2, 1, 0, [5])]
    )
    world.batch.stage(world.reader.read(first))
    second = world.reader.read(StepPlan(1, [one], [2], [1], [True], 1, 1, True))
    assert second.token_ids is not None
    assert second.token_ids.tolist() == [-3]
    world.batch.stage(second)
    third = world.reader.read(StepPlan(2, [one], [3], [1], [True], 1, 1, False))
    assert third.same_rows
    assert third.slots is None
    staged = world.batch.stage(third)
    assert staged.views.positions.tolist() == [3]
    assert staged.batch.groups[0].slots.tolist() == [9 * 4 + 3]


def test_a_graphs_bound_holds_for_every_replay_of_it() -> None:
    """What a kernel bakes into a graph from ``max_kv_len`` stays right, however long the rows become."""
    world = World(0, in_place=False)
    one = request("a", [3, 4])
    one.batch_index = 2
    plan = StepPlan(0, [one], [1], [1], [True], 1, 1, True, admitted=[one], new_blocks=[(2, 0, 0, [9]), (2, 1, 0, [5])])
    delta = world.reader.read(plan)
    tables = [torch.zeros(4, width, dtype=torch.int32) for width in world.batch.widths]
    assert [view.max_kv_len for view in world.batch.stage(delta).batch.groups] == [2, 2]
    staged = world.batch.stage(delta, rows=4, tokens=4, tables=tables).batch
    assert [view.max_kv_len for view in staged.groups] == [LEN, LEN]
    assert all(view.block_table is table for view, table in zip(staged.groups, tables))


def test_more_block_changes_than_the_buffer_holds() -> None:
    batch = PersistentBatch(
        groups()[:1], HostDevice(), max_rows=64, max_tokens=64, max_len=4000, num_scratch=(1,), in_place=False
    )
    reader = DeltaReader(64, 1, 0)
    requests: list[Any] = []
    for slot in range(64):
        one = request(f"r{slot}", [1, 2])
        one.batch_index = slot
        requests.append(one)
    updates = [(slot, 0, 0, list(range(1 + slot, 901 + slot))) for slot in range(64)]
    plan = StepPlan(0, requests, [0] * 64, [1] * 64, [False] * 64, 0, 64, True, admitted=requests, new_blocks=updates)
    delta: StepDelta = reader.read(plan)
    batch.stage(delta)
    assert torch.equal(batch.tables[0], torch.from_numpy(batch.table(0)))
    assert batch.tables[0][63, :3].tolist() == [64, 65, 66]
