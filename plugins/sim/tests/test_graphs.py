"""Graphs record calls with their addresses, bake in what the host gave, and refuse what a device could not replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dougong.errors import EngineError
from dougong_sim import graphs
from dougong_sim.device import SimDevice
from dougong_sim.graphs import SimGraph, SimGraphs


@pytest.fixture
def backend(device: SimDevice) -> SimGraphs:
    return SimGraphs(device.index)


def captured(backend: SimGraphs, fn: Callable[[], object]) -> SimGraph:
    graph = backend.new()
    with graph.capture():
        fn()
    return graph


def test_replay_reads_and_writes_the_same_addresses(backend: SimGraphs) -> None:
    x, w, result = torch.ones(2, 3, device="sim"), torch.ones(3, 3, device="sim"), torch.zeros(2, 3, device="sim")
    graph = captured(backend, lambda: result.copy_(torch.relu(x @ w - 1).softmax(-1)))
    x.copy_(torch.tensor([[1.0, 2, 3], [0, 0, 9]]))
    w.copy_(torch.eye(3))
    graph.replay()
    assert torch.equal(result.cpu(), torch.relu(x.cpu() - 1).softmax(-1))
    w.mul_(2)
    graph.replay()
    assert torch.equal(result.cpu(), torch.relu(x.cpu() * 2 - 1).softmax(-1))
    assert graph.num_calls == 5


def test_results_are_not_there_before_the_first_replay(backend: SimGraphs) -> None:
    x = torch.ones(4, device="sim")
    made: list[torch.Tensor] = []
    graph = captured(backend, lambda: made.append(x + 1))
    assert made[0].isnan().all()
    graph.replay()
    assert made[0].tolist() == [2, 2, 2, 2]
    x.fill_(5)
    assert made[0].tolist() == [2, 2, 2, 2]
    graph.replay()
    assert made[0].tolist() == [6, 6, 6, 6]


def test_host_values_are_baked_in(backend: SimGraphs) -> None:
    x, result = torch.zeros(3, device="sim"), torch.zeros(3, device="sim")
    number, on_host = 2, torch.tensor(10.0)
    graph = captured(backend, lambda: result.copy_(x + number + on_host))
    number = 3
    on_host.fill_(99)
    graph.replay()
    assert result.tolist() == [12, 12, 12]
    assert number == 3


def test_pinned_copies_are_replayed(backend: SimGraphs) -> None:
    host, back = torch.zeros(3, pin_memory=True), torch.zeros(3, pin_memory=True)
    staged = torch.zeros(3, device="sim")

    def step() -> None:
        staged.copy_(host, non_blocking=True)
        back.copy_(staged * 2, non_blocking=True)

    graph = captured(backend, step)
    host.fill_(4)
    graph.replay()
    assert back.tolist() == [8, 8, 8]


def test_growing_an_out_tensor(backend: SimGraphs) -> None:
    x, grown = torch.ones(6, device="sim"), torch.empty(0, device="sim")
    graph = captured(backend, lambda: torch.add(x, 1, out=grown))
    x.fill_(4)
    graph.replay()
    assert grown.tolist() == [5] * 6


def test_random_numbers_advance(backend: SimGraphs) -> None:
    x = torch.zeros(4, device="sim")
    graph = captured(backend, lambda: x.exponential_())
    graph.replay()
    first = x.tolist()
    graph.replay()
    assert x.tolist() != first


def recorded_event() -> torch.Event:
    event = torch.sim.Event()
    event.record()
    return event


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.empty(3).copy_(x, non_blocking=True),
        lambda x: torch.empty(3, pin_memory=True).copy_(x),
        lambda x: torch.tensor([1, 2], device="sim"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.unique(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.sim.synchronize(),
        lambda x: torch.accelerator.synchronize(),
        lambda x: torch.sim.current_stream().synchronize(),
        lambda x: recorded_event().query(),
        lambda x: recorded_event().synchronize(),
        lambda x: torch.empty(2, device="sim:1"),
    ],
)
def test_what_a_device_cannot_replay_is_refused(backend: SimGraphs, call: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(3, device="sim")
    graph = backend.new()
    with pytest.raises(RuntimeError, match=r"while a graph is being captured|outside the pool"), graph.capture():
        call(x)
    assert not torch.sim.is_current_stream_capturing()
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        graph.replay()
    assert x.sum().item() == 3  # the device goes on


def test_memory_that_went_away_is_noticed(backend: SimGraphs) -> None:
    result = torch.zeros(3, device="sim")
    held = [torch.ones(3, device="sim")]
    graph = captured(backend, lambda: result.copy_(held[0] * 2))
    held.clear()
    with pytest.raises(RuntimeError, match="freed after the capture"):
        graph.replay()


def test_graphs_share_a_pool(backend: SimGraphs) -> None:
    before = torch.sim.memory_reserved()
    pool = backend.new_pool()
    x, result = torch.ones(1 << 18, device="sim"), torch.zeros(1 << 18, device="sim")
    kept = torch.sim.memory_reserved()
    made = []
    for factor in (2, 3):
        graph = backend.new(pool)
        with graph.capture():
            for _ in range(10):
                result.copy_(x * factor + 1)
        made.append(graph)
    assert torch.sim.memory_reserved() - kept == 2 << 20  # two temporaries of 1 MiB serve 40 calls and both graphs
    made[0].replay()
    assert result[0].item() == 3
    made[1].replay()
    assert result[0].item() == 4
    del made, graph, pool, x, result
    assert torch.sim.memory_reserved() == before


def test_a_capture_leaves_other_graphs_results_alone(backend: SimGraphs) -> None:
    pool = backend.new_pool()
    x = torch.ones(4, device="sim")
    first, second = backend.new(pool), backend.new(pool)
    with first.capture():
        result = x * 2
    first.replay()
    with second.capture():
        other = x * 3
    assert result.tolist() == [2] * 4
    assert other.isnan().all()
    second.replay()
    assert (result.tolist(), other.tolist()) == ([2] * 4, [3] * 4)


def test_a_group_can_be_recorded_again(backend: SimGraphs) -> None:
    x, middle, result = (torch.ones(4, device="sim") for _ in range(3))
    graph = backend.new()
    with graph.capture():
        y = x + 1
        with graph.group() as handle:
            torch.mul(y, 10, out=middle)
        torch.add(middle, y, out=result)
    graph.replay()
    assert result.tolist() == [22] * 4
    with graph.update(handle):
        torch.mul(y, 100, out=middle)
    x.fill_(2)
    graph.replay()
    assert result.tolist() == [303] * 4
    with pytest.raises(RuntimeError, match="operator cannot change"), graph.update(handle):
        torch.sub(y, 1, out=middle)
    with pytest.raises(RuntimeError, match="out="), graph.update(handle):
        kept = y * 7
    del kept
    graph.replay()  # a refused update leaves the graph as it was
    assert result.tolist() == [303] * 4


def test_one_capture_at_a_time(backend: SimGraphs) -> None:
    graph = captured(backend, lambda: None)
    with pytest.raises(RuntimeError, match="already holds a capture"), graph.capture():
        pass
    outer = backend.new()
    with pytest.raises(RuntimeError, match="already capturing"), outer.capture(), backend.new().capture():
        pass
    with pytest.raises(RuntimeError, match="replaying another graph"), backend.new().capture():
        graph.replay()


def test_the_budget_is_kept(backend: SimGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.budget(30) == 34
    assert backend.budget(10**6) == 1
    monkeypatch.setattr(graphs, "MAX_GROUPS", 2)
    x = torch.zeros(1, device="sim")
    full = backend.new()
    with full.capture():
        for _ in range(2):
            with full.group():
                x.add_(1)
    graph = backend.new()
    with pytest.raises(EngineError, match="already hold 2 groups"), graph.capture(), graph.group():
        pass
    del full, graph
    captured(backend, lambda: x.add_(1))
