"""What of the fleet needs no Ray: prefixes, the choice among replicas, going on after a loss, options."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from dougong_ray.config import FleetConfig
from dougong_ray.prefixes import PrefixIndex, choose
from dougong_ray.resume import Resumable
from dougong_ray.versions import check_version

from dougong.errors import ConfigError, EngineError
from dougong.types import SamplingParams


class TestPrefixes:
    def test_the_longest_prefix_is_found(self) -> None:
        index: PrefixIndex[str] = PrefixIndex(4)
        index.record(index.names(list(range(16))), "a")
        index.record(index.names([*range(8), 99, 98, 97, 96]), "b")
        names = index.names([*range(12), 1, 1, 1, 1])
        assert index.matched(names, ["a", "b", "c"]) == {"a": 3, "b": 2, "c": 0}

    def test_only_full_blocks_count_and_salts_keep_apart(self) -> None:
        index: PrefixIndex[str] = PrefixIndex(4)
        assert index.names([1, 2, 3]) == []
        index.record(index.names([1, 2, 3, 4], "tenant"), "a")
        assert index.matched(index.names([1, 2, 3, 4]), ["a"]) == {"a": 0}
        assert index.matched(index.names([1, 2, 3, 4], "tenant"), ["a"]) == {"a": 1}

    def test_a_lost_replica_is_forgotten(self) -> None:
        index: PrefixIndex[str] = PrefixIndex(4)
        names = index.names(list(range(8)))
        index.record(names, "a")
        index.record(names[:1], "b")
        index.forget("a")
        assert index.matched(names, ["a", "b"]) == {"a": 0, "b": 1}
        assert len(index) == 1

    def test_memory_is_bounded_and_the_front_of_a_prompt_is_kept_longest(self) -> None:
        index: PrefixIndex[str] = PrefixIndex(4, capacity=3)
        names = index.names(list(range(16)))
        index.record(names, "a")
        assert len(index) == 3
        assert index.matched(names, ["a"]) == {"a": 3}


class TestChoice:
    def test_a_prefix_wins_until_its_replica_is_crowded(self) -> None:
        assert choose({"a": 5, "b": 0}, {"a": 3, "b": 0}, 8)[0] == "a"
        assert choose({"a": 5, "b": 0}, {"a": 8, "b": 0}, 8)[0] == "b"

    def test_without_a_prefix_the_idlest_is_first(self) -> None:
        assert choose({}, {"a": 2, "b": 1, "c": 4}, 8) == ["b", "a", "c"]
        assert choose({}, {}, 8) == []


class TestGoingOn:
    def test_the_rest_is_asked_for_with_what_came(self) -> None:
        rest = Resumable([1, 2], SamplingParams(max_tokens=10, min_tokens=4, temperature=0, prompt_logprobs=1))
        assert rest.take([7, 8, 9]) == 0
        job = rest.next_job()
        assert job["prompt_token_ids"] == [1, 2, 7, 8, 9]
        assert (job["params"].max_tokens, job["params"].min_tokens, job["params"].prompt_logprobs) == (7, 1, None)
        assert rest.take([5]) == 0
        assert rest.tokens == [7, 8, 9, 5]
        assert not rest.complete

    def test_a_full_completion_needs_no_replica(self) -> None:
        rest = Resumable([1], SamplingParams(max_tokens=2, temperature=0))
        rest.take([3, 4])
        assert rest.complete

    def test_penalties_make_it_begin_anew_and_pass_over_what_was_seen(self) -> None:
        rest = Resumable([1, 2], SamplingParams(max_tokens=10, temperature=0, presence_penalty=0.5))
        rest.take([7, 8, 9])
        job = rest.next_job()
        assert job["prompt_token_ids"] == [1, 2]
        assert job["params"].max_tokens == 10
        assert rest.take([7]) == 1
        assert rest.take([8, 9, 4]) == 2
        assert rest.take([5]) == 0
        assert rest.tokens == [7, 8, 9, 4, 5]

    def test_other_tokens_than_were_sent_are_an_error(self) -> None:
        rest = Resumable([1], SamplingParams(max_tokens=10, temperature=0, frequency_penalty=0.5))
        rest.take([7, 8])
        rest.next_job()
        with pytest.raises(EngineError, match="other tokens than were sent"):
            rest.take([7, 6])


class TestConfig:
    def test_each_replica_has_its_backend(self) -> None:
        config = FleetConfig(engine={"model": "m"}, backends=("cpu", "sim"), replicas=4)
        assert [config.engine_options(rank)["backend"] for rank in range(4)] == ["cpu", "sim", "cpu", "sim"]
        assert FleetConfig(backends=("cpu", "sim")).num_replicas == 2
        assert FleetConfig().num_replicas == 1

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"engine": {"backend": "cpu"}, "backends": ("cpu",)}, "one of the two"),
            ({"backends": ("cpu", "sim"), "replicas": 3}, "multiple of 2"),
            ({"attempts": 0}, "at least 1"),
            ({"imbalance": -1}, "below 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            FleetConfig(**options)  # type: ignore[arg-type]


def test_the_package_and_its_plain_parts_import_neither_ray_nor_torch() -> None:
    code = (
        "import sys, dougong_ray, dougong_ray.config, dougong_ray.prefixes, dougong_ray.resume, dougong_ray.replica\n"
        "assert not {'ray', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["check", "ready", "generate", "embed", "abort", "close"])
def test_the_server_calls_a_fleet_as_it_calls_an_engine(name: str) -> None:
    """Read, not imported: Ray need not be there."""

    def arguments(module: str, kind: str) -> str:
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None
        tree = ast.parse(Path(found.origin).read_text())
        (body,) = (one.body for one in tree.body if isinstance(one, ast.ClassDef) and one.name == kind)
        (method,) = (
            one for one in body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) and one.name == name
        )
        return ast.unparse(method.args)

    ours = arguments("dougong_ray.client", "FleetClient")
    assert ours == arguments("dougong.server.process.client", "EngineClient")


def test_another_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="2.60.3"))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="3.1.0"))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"was run with Ray 2\.60; this is 3\.1\.0"):
        check_version()
