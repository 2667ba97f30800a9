"""A plugin's scheduling policy decides who goes first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_harness import BACKEND, check_clean, greedy

from dougong.config import EngineConfig
from dougong.engine import Engine
from dougong.engine.policies import find_policy
from dougong.errors import ConfigError, PluginAnswerError
from dougong.plugins import ABI, Plugins, SchedulerSpec, hookimpl, load_plugins
from dougong.scheduling import POLICIES, Request, SchedulerConfig


def last_come(request: Request, order: int, step: int, config: SchedulerConfig) -> tuple[int, int]:
    return (-order, order)


class Policies:
    @hookimpl
    def dougong_schedulers(self) -> Iterator[SchedulerSpec]:
        yield SchedulerSpec(name="last_come", abi=ABI, target=f"{__name__}:last_come")
        yield SchedulerSpec(name="gone", abi=ABI, target=f"{__name__}:no_such_thing")
        yield SchedulerSpec(name="odd", abi=ABI, target=f"{__name__}:BACKEND")
        yield SchedulerSpec(name="fcfs", abi=ABI, target=f"{__name__}:last_come")  # the core's names are the core's


def plugins() -> Plugins:
    return load_plugins(BACKEND, extra=[("policies", Policies())])


def test_an_engine_serves_in_the_plugins_order(llama: Path) -> None:
    values = {"backend": BACKEND, "dtype": "float32", "max_num_seqs": 1, "num_kv_blocks": 40, "max_model_len": 64}
    config = EngineConfig(model=str(llama), scheduling_policy="last_come", warm_up=False, **values)
    engine = Engine(config, plugins=plugins())
    assert engine.scheduler.describe()["policy"] == "last_come"
    outputs = [engine.add(f"r{index}", [5 + index], greedy(2)) for index in range(3)]
    ended: list[str] = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finished]
    assert ended == ["r2", "r1", "r0"] and all(output.finished for output in outputs)
    check_clean(engine)
    engine.close()


def test_the_core_s_own_names_and_those_of_nobody() -> None:
    assert find_policy("fcfs", plugins()) is POLICIES["fcfs"]
    with pytest.raises(ConfigError, match=r"'last_com': no plugin offers it. Did you mean 'last_come'.*fcfs, gone"):
        find_policy("last_com", plugins())


def test_a_policy_that_cannot_be_used_is_the_plugin_s_fault() -> None:
    with pytest.raises(PluginAnswerError, match=r"'policies' offers .*'gone'.*cannot be imported"):
        find_policy("gone", plugins())
    with pytest.raises(PluginAnswerError, match=r"'policies': .* expected a function"):
        find_policy("odd", plugins())
