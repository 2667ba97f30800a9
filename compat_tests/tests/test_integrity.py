"""What a plugin may not change, where it runs and where it is judged."""

from __future__ import annotations

import importlib

import pytest

from dougong_compat.cases import MODULES
from dougong_compat.harness import guard
from dougong_compat.integrity import changes
from dougong_compat.judge import kinds
from dougong_compat.outcome import Outcome
from dougong_compat.pool import Target, Worker
from dougong_compat.selftest.lab import Lab

CASE = "L1/attention/mandatory/decode-h4k1-d64"


def test_the_suite_as_it_is_has_no_strangers() -> None:
    for name in ("session", "fuzzing", "execute.stress", "execute.manager", "execute.engine", "commands.app"):
        importlib.import_module(f"dougong_compat.{name}")
    for name in MODULES:
        importlib.import_module(f"dougong_compat.cases.{name}")
    for kind in kinds.KINDS:
        kinds.find(kind)
    assert changes() == []


@pytest.mark.parametrize(
    ("where", "name"), [(guard.Watch, "findings"), (guard, "same_bits"), (kinds, "find"), (guard, "Fenced")]
)
def test_a_changed_check_is_named(where: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type(name, (), {"__module__": "somedev"}) if name == "Fenced" else lambda *_: []
    stranger.__module__ = "somedev.hooks"
    monkeypatch.setattr(where, name, stranger)
    assert [text for text in changes() if text.endswith(f".{name} is somedev.hooks's")], changes()
    monkeypatch.undo()
    assert changes() == []


@pytest.mark.prove
def test_a_backend_that_changes_the_suite_fails() -> None:
    with Worker(Target("cheat-patches", ("dougong_compat.selftest.cheats",)), timeout=20.0) as worker:
        worker.start()
        result = Lab(worker).judge(CASE, "cheat-patches")
    assert result.outcome is Outcome.FAIL and "guard.Watch.findings" in result.message, result


def test_the_suites_skip_is_not_a_kernels(lab: Lab) -> None:
    result = lab.judge(CASE, "cheat-skips-itself")
    assert result.outcome is Outcome.FAIL and "raised CannotAllocate" in result.message, result
