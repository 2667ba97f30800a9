"""Every sampling option against code for one row that does the obvious thing."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from execution_harness import HostDevice

from dougong.execution.delta import SlotInit
from dougong.execution.sampler import BLOCKED_ROW, NAN_ROW, Sampled, Sampler
from dougong.execution.sampling_state import SamplingState
from dougong.execution.transfer import Transfer
from dougong.hal import OpTable
from dougong.hal.reference.sampling import gumbel_noise
from dougong.types import SamplingParams

V = 40
SLOTS = 6


class Row:
    """A request as the reference sees it."""

    def __init__(self, slot: int, sampling: SamplingParams, prompt: list[int], ends: tuple[int, ...] = (1,)) -> None:
        self.slot, self.sampling, self.prompt, self.ends = slot, sampling, prompt, ends
        self.seed = 1000 + slot
        self.output: list[int] = []

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def init(self) -> SlotInit:
        return SlotInit(
            self.slot, f"r{self.slot}", self.sampling, self.seed, len(self.prompt), self.ends, self.prompt, self.output
        )

    def shaped(self, logits: torch.Tensor) -> list[float]:
        """The logits [V] after all options that come before the temperature."""
        s, x = self.sampling, logits.tolist()
        for token in range(V):
            if s.allowed_token_ids is not None and token not in s.allowed_token_ids:
                x[token] = -math.inf
            x[token] += (s.logit_bias or {}).get(token, 0.0)
            if token in self.ends and len(self.output) < s.min_tokens:
                x[token] = -math.inf
            for word in s.bad_words_ids:
                begun = list(word[:-1])
                if word[-1] == token and self.output[len(self.output) - len(begun) :] == begun:
                    x[token] = -math.inf
            if token in self.prompt or token in self.output:
                x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
            x[token] -= s.frequency_penalty * self.output.count(token)
            x[token] -= s.presence_penalty * (token in self.output)
        return x

    def choose(self, logits: torch.Tensor) -> int:
        s, x = self.sampling, self.shaped(logits)
        if max(x) == -math.inf:
            return BLOCKED_ROW
        if s.greedy:
            return x.index(max(x))
        x = [value / s.temperature for value in x]
        if 0 < s.top_k < V:
            edge = sorted(x, reverse=True)[s.top_k - 1]
            x = [value if value >= edge else -math.inf for value in x]
        total = sum(math.exp(value - max(x)) for value in x)
        chance = [math.exp(value - max(x)) / total for value in x]
        keep, before = set(), 0.0
        for token in sorted(range(V), key=lambda t: (-chance[t], t)):
            if before < s.top_p:
                keep.add(token)
            before += chance[token]
        top = max(chance)
        keep = {token for token in keep if chance[token] >= s.min_p * top and x[token] > -math.inf}
        noise = gumbel_noise(torch.tensor([self.seed]), torch.tensor([self.position]), torch.arange(V))[0].tolist()
        return max(keep, key=lambda token: x[token] + noise[token])


class Bench:
    """A sampler alone, and rows that come and go."""

    def __init__(self) -> None:
        self.last_token = torch.zeros(SLOTS + 1, dtype=torch.int64)
        self.state = SamplingState(Transfer(HostDevice()), SLOTS, V)
        self.sampler = Sampler(OpTable(), self.state, self.last_token)

    def step(self, rows: list[Row], logits: torch.Tensor, **options: Any) -> Sampled:
        slots = np.array([row.slot for row in rows])
        positions = np.array([row.position for row in rows])
        return self.sampler.sample(
            logits, torch.from_numpy(slots), torch.from_numpy(positions), slots, positions, **options
        )


def params(rng: random.Random) -> SamplingParams:
    """A random handful of options."""
    values: dict[str, Any] = {"temperature": rng.choice([0.0, 0.3, 1.0, 2.5]), "max_tokens": 50}
    maybe: dict[str, Any] = {
        "top_k": rng.choice([1, 3, 10, V, V + 5]),
        "top_p": rng.choice([0.05, 0.5, 0.9]),
        "min_p": rng.choice([0.02, 0.3]),
        "repetition_penalty": rng.choice([0.5, 1.3, 3.0]),
        "presence_penalty": rng.choice([-1.5, 0.7]),
        "frequency_penalty": rng.choice([-0.5, 1.9]),
        "logit_bias": {rng.randrange(V): rng.choice([-100.0, 5.0, 2.5]) for _ in range(3)},
        "allowed_token_ids": tuple(rng.sample(range(V), rng.choice([1, 7, 30]))),
        "min_tokens": rng.choice([1, 3, 20]),
        "bad_words_ids": tuple(
            tuple(rng.choices(range(8), k=rng.choice([1, 2, 2, 3]))) for _ in range(rng.randrange(1, 25))
        ),
        "logprobs": rng.choice([0, 3, -1]),
    }
    for name in rng.sample(sorted(maybe), rng.randrange(0, 6)):
        values[name] = maybe[name]
    return SamplingParams(**values)


@pytest.mark.parametrize("seed", range(25))
def test_all_options_at_once(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    rows: dict[int, Row] = {}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(12):
        for slot in range(SLOTS):  # requests come, go, and come back to a slot
            if slot in rows and rng.random() < 0.15:
                bench.state.release(rows.pop(slot).slot)
            if slot not in rows and rng.random() < 0.6:
                rows[slot] = Row(slot, params(rng), rng.choices(range(V), k=rng.randrange(1, 6)))
                rows[slot].output = rng.choices(range(8), k=rng.randrange(0, 4))  # resumed after a preemption
                bench.state.admit(rows[slot].init())
        batch = rng.sample(list(rows.values()), rng.randrange(1, len(rows) + 1)) if rows else []
        if not batch:
            continue
        # Few distinct continuations, so that bad words and penalties come into play.
        logits = torch.randn(len(batch), V, generator=generator) * 2
        logits[:, :8] += 3
        expected = [row.choose(logits[i]) for i, row in enumerate(batch)]
        raw = logits.clone()
        got = bench.step(batch, logits)
        assert got.tokens.tolist() == expected
        check_logprobs(got, batch, raw)
        for row, token in zip(batch, expected):
            assert int(bench.last_token[row.slot]) == max(token, 0)
            row.output.append(max(token, 0))


def check_logprobs(got: Sampled, batch: list[Row], raw: torch.Tensor) -> None:
    """They are those of the raw logits, of the token chosen in spite of all options."""
    asked = [i for i, row in enumerate(batch) if row.sampling.logprobs is not None]
    assert got.logprob_rows == asked
    if not asked:
        return
    assert got.logprobs is not None
    chosen, rank, ids, tops = got.logprobs
    for j, i in enumerate(asked):
        table = raw[i].log_softmax(-1)
        token = max(int(got.tokens[i]), 0)
        assert float(chosen[j]) == pytest.approx(float(table[token]), abs=1e-5)
        assert int(rank[j]) == int((table > table[token]).sum()) + 1
        count = got.logprob_counts[j]
        assert count == batch[i].sampling.logprobs
        count = V if count < 0 else count
        assert ids[j, :count].tolist() == table.argsort(descending=True)[:count].tolist()
        assert torch.allclose(tops[j, :count], table.sort(descending=True).values[:count], atol=1e-5)


def test_greedy_alone_takes_the_lowest_of_equal_ids_and_finds_nan() -> None:
    bench = Bench()
    rows = [Row(i, SamplingParams(temperature=0), [1]) for i in range(3)]
    for row in rows:
        bench.state.admit(row.init())
    assert bench.state.plain
    logits = torch.zeros(3, V)
    logits[0, [9, 4, 20]] = 7.0
    logits[1, 5], logits[1, 7] = torch.nan, 100.0
    got = bench.step(rows, logits.to(torch.bfloat16))
    assert got.tokens.tolist() == [4, NAN_ROW, 0]
    assert bench.last_token.tolist()[:3] == [4, 0, 0]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"top_k": 3}, {"presence_penalty": 1.0, "temperature": 0.0}]
)
def test_nan_fails_its_row_alone(sampling: dict[str, Any]) -> None:
    bench = Bench()
    rows = [Row(i, SamplingParams(**sampling), [1]) for i in range(2)]
    for row in rows:
        bench.state.admit(row.init())
    logits = torch.randn(2, V)
    logits[0, 3] = torch.nan
    expected = rows[1].choose(logits[1])
    assert bench.step(rows, logits).tokens.tolist() == [NAN_ROW, expected]


def test_options_that_leave_no_token_say_so() -> None:
    bench = Bench()
    row = Row(0, SamplingParams(allowed_token_ids=(1,), min_tokens=3), [2])
    bench.state.admit(row.init())
    assert bench.step([row], torch.randn(1, V)).tokens.tolist() == [BLOCKED_ROW]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(4, V)
    together = Bench()
    rows = [Row(i, SamplingParams(temperature=1.5, top_p=0.9 if i else 1.0), [1, 2]) for i in range(4)]
    for row in rows:
        together.state.admit(row.init())
    expected = together.step(rows, logits.clone()).tokens.tolist()
    for i, row in enumerate(rows):
        alone = Bench()
        alone.state.admit(row.init())
        assert alone.step([row], logits[i : i + 1].clone()).tokens.tolist() == [expected[i]]


def test_draws_follow_the_probabilities() -> None:
    bench = Bench()
    row = Row(0, SamplingParams(temperature=1.0, max_tokens=5000), [1])
    bench.state.admit(row.init())
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0] + [-20.0] * (V - 4)])
    counts = torch.zeros(V)
    for _ in range(900):
        token = int(bench.step([row], logits.clone()).tokens)
        row.output.append(token)
        counts[token] += 1
    assert torch.allclose(counts / 900, logits[0].softmax(-1), atol=0.06)


def test_a_grammars_mask_forbids_tokens() -> None:
    bench = Bench()
    row = Row(0, SamplingParams(temperature=0), [1])
    bench.state.admit(row.init())
    allowed = torch.zeros(1, V, dtype=torch.bool)
    allowed[0, 17] = True
    assert bench.step([row], torch.randn(1, V), allowed=allowed).tokens.tolist() == [17]


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    bench = Bench()
    sampling = SamplingParams(
        temperature=0, logit_bias={V + 3: 5.0, 2: 100.0}, bad_words_ids=((V + 1,), (V + 5, 3)), min_tokens=2
    )
    row = Row(0, sampling, [V + 9, 1], ends=(V + 2,))
    bench.state.admit(row.init())
    assert bench.step([row], torch.randn(1, V)).tokens.tolist() == [2]
