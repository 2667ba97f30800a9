"""The suite catches what it should: a sample on every change, all of it under ``prove``."""

from __future__ import annotations

import pytest

from dougong_compat.cases import collect_all
from dougong_compat.selftest.cheats import CHEATS, verdict_on
from dougong_compat.selftest.lab import Lab
from dougong_compat.selftest.mutants import all_mutants
from dougong_compat.selftest.plant import mutated_source
from dougong_compat.selftest.prove import prove, try_mutant

MUTANTS = all_mutants()


def test_enough_mutants_and_few_equivalents() -> None:
    real = [mutant for mutant in MUTANTS if not mutant.equivalent]
    assert len(real) >= 60
    assert {case.entry for case in collect_all(False)} <= {mutant.entry for mutant in real}
    assert sum(1 for mutant in MUTANTS if mutant.equivalent) <= 3


def test_every_mutant_applies_and_names_a_case() -> None:
    ids = {case.id for case in collect_all(False)}
    for mutant in MUTANTS:
        if not mutant.manager:
            compile(mutated_source(mutant), mutant.name, "exec")
        assert mutant.equivalent or mutant.killed_by in ids, mutant.name


@pytest.mark.parametrize(
    "name",
    [
        "block-id-16-bits",
        "window-one-more",
        "softcap-dropped",
        "write-whole-block",
        "replay-stale-lengths",
        "no-copy-on-write",
        "batch-dependent-split",
        "writes-past-out",
        "offset-int32-page",
        "reads-past-the-table",
    ],
)
def test_a_mutant_is_killed_by_its_case(lab: Lab, name: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    killed, why = try_mutant(lab.worker, mutant)
    assert killed, why


@pytest.mark.prove
@pytest.mark.timeout(1500)
def test_self_test() -> None:
    """Every mutant. The honest backends stand in test_backends, the oracle's bugs in test_oracle."""
    outcome = prove(honest=False)
    total = len(outcome["killed"]) + len(outcome["survivors"])
    assert len(outcome["killed"]) >= 0.95 * total, outcome["survivors"]


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_not_conformant(name: str) -> None:
    word, why = verdict_on(name)
    assert word in ("NOT", "INVALID"), (word, why)
