"""Graphs: which batch runs on which, and that replays give the tokens of eager steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from execution_harness import drive, make_runner, prompts, request

from dougong.execution.graphs import GraphCache, GraphKey, decode_sizes, mixed_sizes, within
from dougong.hal import Graph, GraphBackend


class FakeGraph(Graph):
    def __init__(self, log: list[str], fails: bool) -> None:
        super().__init__()
        self.log, self.fails = log, fails

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.log.append("capture")
        if self.fails:
            raise RuntimeError("no capture today")
        yield

    def replay(self) -> None:
        self.log.append("replay")


class FakeGraphs(GraphBackend):
    def __init__(self, fails: bool = False) -> None:
        self.log: list[str] = []
        self.fails = fails

    def new(self, pool: Any = None) -> FakeGraph:
        return FakeGraph(self.log, self.fails)


class FakeKernel:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def new_plan(self) -> Any:
        return object()

    def update_graph(self, graph: Graph, plan: Any) -> None:
        self.log.append("update")


def cache(graphs: FakeGraphs, update: bool = False) -> GraphCache:
    kernels: list[Any] = [FakeKernel(graphs.log)]
    return GraphCache(graphs, kernels, [update], decode_sizes(20), mixed_sizes(130), 20)


def test_sizes() -> None:
    assert decode_sizes(6) == (1, 2, 4, 6)
    assert decode_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert decode_sizes(256)[-14:] == (56, 64, *range(80, 257, 16))
    assert decode_sizes(8, (2, 8, 99)) == (2, 8)
    assert mixed_sizes(130) == (32, 64, 128)
    assert within((1, 2, 4, 8, 16), 3) == (1, 4, 16)
    assert within((1, 2, 4), 1) == (4,)
    assert within((1, 2), 0) == ()


def test_the_smallest_graph_that_holds_a_batch() -> None:
    graphs = cache(FakeGraphs())
    assert graphs.key_for(3, 3, True) == GraphKey(4, 4, True)
    assert graphs.key_for(17, 17, True) == GraphKey(20, 20, True)
    assert graphs.key_for(5, 40, False) == GraphKey(64, 21, False)
    assert graphs.key_for(5, 129, False) is None
    sizes = graphs.sizes()
    assert [key.tokens for key in sizes] == [128, 64, 32, 20, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("update", [False, True])
def test_a_replay_is_brought_up_to_date_first(update: bool) -> None:
    backend = FakeGraphs()
    graphs = cache(backend, update)
    key = GraphKey(4, 4, True)
    entry = graphs.entry(key)
    assert graphs.entry(key) is entry
    output = torch.zeros(4, 2), None
    graphs.capture(entry, key, lambda: output)
    assert entry.ready
    assert graphs.replay(entry) is output
    assert backend.log == ["capture", *(["update"] if update else []), "replay"]


def test_a_capture_that_fails_leaves_eager_steps() -> None:
    graphs = cache(FakeGraphs(fails=True))
    key = GraphKey(4, 4, True)
    graphs.capture(graphs.entry(key), key, lambda: (torch.zeros(1), None))
    assert "no capture today" in graphs.failed
    assert graphs.key_for(3, 3, True) is None
    assert not graphs.captured


@pytest.fixture(scope="module")
def sim() -> Any:
    """The simulated accelerator: its graphs go stale unless they are updated."""
    dougong_sim = pytest.importorskip("dougong_sim")
    from dougong.hal import open_backend
    from dougong.plugins import load_plugins

    return open_backend("sim", plugins=load_plugins("", entries=(), extra=[("sim", dougong_sim)]))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", ["llama_folder", "gemma_folder"])
def test_replays_give_the_tokens_of_eager_steps(
    sim: Any, family: str, overlap: bool, warm: bool, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    graphed = make_runner(folder, backend=sim)
    graphs = graphed._parts.graphs
    assert graphs is not None
    if warm:
        graphed.warm_up()
        assert all(graphs.captured[key].ready for key in graphs.sizes())
    used: list[bool] = []
    execute = graphed.execute

    def watched(plan: Any) -> Any:
        pending = execute(plan)
        used.append(pending.timings.graph)
        return pending

    graphed.execute = watched  # type: ignore[method-assign]
    got = drive(graphed, _requests(), overlap=overlap, stagger=2)
    assert not graphs.failed
    assert sum(used) > len(used) / 2
    assert got == drive(make_runner(folder, backend=sim, enforce_eager=True), _requests(), overlap=overlap, stagger=2)
    assert got == drive(make_runner(folder), _requests())


def _requests() -> list[Any]:
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"frequency_penalty": 1.0}, {"logprobs": 2}, {}]
    given = prompts(5, seed=8)
    return [request(f"r{i}", p, max_tokens=12, **kind) for i, (p, kind) in enumerate(zip(given, kinds))]


def test_eager_when_asked(sim: Any, llama_folder: Path) -> None:
    assert make_runner(llama_folder, backend=sim, enforce_eager=True)._parts.graphs is None
    assert make_runner(llama_folder)._parts.graphs is None
