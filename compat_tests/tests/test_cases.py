"""The set of cases: size, names, needs, must-pass files, the catalogue."""

from __future__ import annotations

from collections import Counter

import pytest

from dougong_compat.case import seed_of
from dougong_compat.cases import collect_all, collect_profile
from dougong_compat.cases.regression import WITHOUT
from dougong_compat.cases.regression.entry import TOTAL
from dougong_compat.covering import cover
from dougong_compat.honesty import FLOORS, mustpass_hash, mustpass_ids


@pytest.mark.parametrize("profile", ["smoke", "core", "full"])
def test_collected_cases_are_those_published(profile: str) -> None:
    ids = [case.id for case in collect_profile(profile)]
    assert sorted(ids) == mustpass_ids(profile), "run: dougong compat list --publish <mustpass folder>"
    assert len(set(ids)) == len(ids)


def test_core_is_large_enough() -> None:
    levels = Counter(case.level for case in collect_profile("core"))
    assert sum(levels.values()) >= 3500
    assert levels["L0"] >= 50 and levels["L1"] >= 2600 and levels["L2"] >= 1100 and levels["L3"] >= 120
    assert Counter(case.level for case in collect_profile("full"))["L4"] >= 140


def test_floors_can_be_met() -> None:
    for profile, floors in FLOORS.items():
        levels = Counter(case.level for case in collect_profile(profile))
        assert all(levels[level] >= floor for level, floor in floors.items()), (profile, levels)


def test_every_catalogue_entry_has_a_case_or_a_reason() -> None:
    covered = {case.entry for case in collect_all(False) if case.entry}
    assert covered | set(WITHOUT) == set(range(1, TOTAL + 1))
    assert not covered & set(WITHOUT)
    assert len(covered) >= 60
    assert all(case.link.startswith("https://github.com/") for case in collect_all(False) if case.entry)


def test_mandatory_cases_need_only_what_the_contract_makes_mandatory() -> None:
    allowed = {"dim:64", "dim:128", "ratio:1", "ratio:4", "ratio:8"}
    for case in collect_all(False):
        if case.mandatory:
            assert set(case.needs) <= allowed, f"{case.id} needs {set(case.needs) - allowed}"


def test_seeds_differ_and_stay() -> None:
    assert seed_of("a") == seed_of("a") != seed_of("b")
    seeds = [seed_of(case.id) for case in collect_all(False)]
    assert len(set(seeds)) == len(seeds)


def test_mustpass_hash_does_not_depend_on_order() -> None:
    assert mustpass_hash(["b", "a"]) == mustpass_hash(["a", "b"]) != mustpass_hash(["a"])


def test_covering_array_covers_every_allowed_tuple() -> None:
    axes = {"a": (0, 1, 2), "b": (0, 1, 2, 3), "c": (0, 1), "d": (0, 1, 2)}

    def allowed(row: dict[str, int]) -> bool:
        return not (row.get("a") == 2 and row.get("b") == 3)

    for strength in (2, 3):
        rows = cover(axes, strength, allowed)
        assert all(allowed(row) for row in rows)
        pairs = {(row["a"], row["b"]) for row in rows}
        assert pairs == {(a, b) for a in range(3) for b in range(4) if not (a == 2 and b == 3)}
        if strength == 3:
            assert {(row["a"], row["c"], row["d"]) for row in rows} == {
                (a, c, d) for a in range(3) for c in range(2) for d in range(3)
            }
        assert len(rows) < 72


def test_the_handbooks_catalogue_is_current() -> None:
    from pathlib import Path

    from dougong_compat.report.catalogue import catalogue

    page = Path(__file__).resolve().parents[2] / "docs" / "conformance" / "catalogue.md"
    assert page.read_text(encoding="utf-8") == catalogue(), "write it anew: the page says how"


def test_the_corpus_holds_shrunk_bugs_and_calls_that_the_suite_once_failed_wrongly() -> None:
    cases = {case.id: case for case in collect_all(False) if case.id.startswith("L1/corpus/")}
    assert len(cases) >= 20 and all(case.seed >= 0 and case.note for case in cases.values())
    for name in ("lse-near-0", "out-of-cancelling-scores"):
        assert cases[f"L1/corpus/honest-kernels-{name}"].params["dtype"] == "float32"
