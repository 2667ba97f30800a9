"""The seven rules, each with what breaks it."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

import pytest

from dougong_compat.cases import collect_profile
from dougong_compat.honesty import unmet, verdict_of
from dougong_compat.manifest import Manifest, ManifestError, Waiver, find, read
from dougong_compat.outcome import Outcome, Result
from dougong_compat.selftest.lab import TODAY, Lab

ALL = dict.fromkeys(("dtype", "kv", "layout", "block", "dim", "ratio", "feature", "cache", "op"))
FULL = Manifest("x", ALL, frozenset({"engine"}))


def smoke(outcome: Outcome = Outcome.PASS) -> tuple[list, list[Result]]:  # type: ignore[type-arg]
    cases = collect_profile("smoke")
    return cases, [Result(case.id, case.level, outcome) for case in cases]


def test_all_passed_is_conformant() -> None:
    cases, results = smoke()
    assert verdict_of("smoke", cases, results, FULL, TODAY).word == "CONFORMANT"


@pytest.mark.parametrize("outcome", [Outcome.FAIL, Outcome.ERROR, Outcome.CRASH, Outcome.TIMEOUT, Outcome.XPASS])
def test_one_bad_outcome_is_not_conformant(outcome: Outcome) -> None:
    cases, results = smoke()
    results[5].outcome = outcome
    verdict = verdict_of("smoke", cases, results, FULL, TODAY)
    assert (verdict.word, verdict.exit_code) == ("NOT", 1)


def test_missing_doubled_or_selected_cases_are_invalid() -> None:
    cases, results = smoke()
    assert verdict_of("smoke", cases, results[:-1], FULL, TODAY).word == "INVALID"
    assert verdict_of("smoke", cases[:-1], results[:-1], FULL, TODAY).word == "INVALID"
    assert verdict_of("smoke", cases, [*results, results[0]], FULL, TODAY).word == "INVALID"
    assert verdict_of("smoke", cases, results, FULL, TODAY, selected=True).word == "INVALID"
    assert verdict_of("smoke", cases, [], FULL, TODAY).exit_code == 2


def test_refusing_nearly_everything_is_invalid() -> None:
    cases, results = smoke(Outcome.UNSUPPORTED)
    verdict = verdict_of("smoke", cases, results, FULL, TODAY)
    assert verdict.word == "INVALID" and "floor" in " ".join(verdict.reasons)


def test_waiving_nearly_everything_is_invalid() -> None:
    """A kernel that is wrong everywhere, with a waiver for every case."""
    cases, results = smoke(Outcome.WAIVED)
    verdict = verdict_of("smoke", cases, results, FULL, TODAY)
    assert verdict.word == "INVALID" and "floor" in " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("device", "dtypes", "part"),
    [("cuda", ["float32"], "16 is mandatory"), ("cuda", ["float32", "float16"], ""), ("cpu", ["float32"], "")],
)
def test_a_16_bit_dtype_is_mandatory_off_the_cpu(device: str, dtypes: list[str], part: str) -> None:
    problems = unmet({"device_type": device, "dtypes": dtypes}, FULL, "core")
    assert bool(problems) is bool(part) and part in " ".join(problems)


def test_certified_skips_and_waives_nothing_that_is_mandatory() -> None:
    cases = collect_profile("certified")
    results = [Result(case.id, case.level, Outcome.PASS) for case in cases]
    assert verdict_of("certified", cases, results, FULL, TODAY).word == "CONFORMANT"
    at = next(index for index, case in enumerate(cases) if case.mandatory)
    for outcome in (Outcome.UNSUPPORTED, Outcome.WAIVED):
        results[at].outcome = outcome
        assert verdict_of("certified", cases, results, FULL, TODAY).word == "INVALID"
    results[at].outcome = Outcome.PASS
    relaxed = dataclasses.replace(FULL, tolerance="relaxed")
    assert verdict_of("certified", cases, results, relaxed, TODAY).word == "INVALID"
    assert unmet({"device_type": "cpu", "dtypes": ["float32"], "guard_pages": False}, FULL, "certified")


def test_declaring_nothing_is_invalid() -> None:
    cases, results = smoke()
    assert verdict_of("smoke", cases, results, Manifest("x", {}, frozenset()), TODAY).word == "INVALID"


@pytest.mark.parametrize(
    ("issue", "days", "ok"),
    [
        ("https://example.org/1", 30, True),
        ("https://example.org/1", 91, False),
        ("later", 30, False),
        ("https://example.org/1", -1, False),
    ],
)
def test_waivers_name_an_issue_and_expire(issue: str, days: int, ok: bool) -> None:
    waiver = Waiver("L1/*", issue, TODAY + datetime.timedelta(days=days))
    manifest = dataclasses.replace(FULL, waivers=(waiver,))
    assert (manifest.problems(TODAY) == []) is ok


def test_a_waived_failure_is_waived_and_a_waived_pass_is_not(lab: Lab) -> None:
    case = "L1/attention/mandatory/decode-h4k1-d64"
    waiver = Waiver(case, "https://example.org/1", TODAY + datetime.timedelta(days=9))
    manifest = dataclasses.replace(FULL, waivers=(waiver,))
    assert lab.judge(case, "honest-tiled", manifest=manifest).outcome is Outcome.XPASS
    assert lab.judge(case, "cheat-zeros", manifest=manifest).outcome is Outcome.WAIVED


def test_a_declared_capability_that_is_refused_fails(lab: Lab) -> None:
    manifest = dataclasses.replace(FULL)
    result = lab.judge("L1/attention/latent/decode-h8k1-nhd-d80-dv64-latent", "honest-tiled", manifest=manifest)
    assert result.outcome is Outcome.PASS and "reference" in result.provider, "the core's reference does it"
    result = lab.judge("L1/attention/mandatory/decode-h4k1-d64", "cheat-skips")
    assert result.outcome is Outcome.FAIL and "mandatory, and refused" in result.message


def test_an_undeclared_capability_is_probed(lab: Lab) -> None:
    little = Manifest("x", {**ALL, "feature": frozenset()}, frozenset())
    case = "L1/attention/feature/softcap-decode-h6k2-d64-cap20.0"
    right = lab.judge(case, "honest-tiled", manifest=little)
    assert right.outcome is Outcome.PASS and right.warnings, "right, but not declared: a warning"
    wrong = lab.judge(case, "cheat-lies", manifest=little)
    assert wrong.outcome is Outcome.FAIL and "not declared" in wrong.message
    refused = lab.judge("L1/attention/latent/decode-h8k1-nhd-d80-dv64-latent", "honest-tiled", manifest=little)
    assert refused.outcome is Outcome.UNSUPPORTED


def test_manifest_errors_name_the_key() -> None:
    for text, part in (
        ("x = 1", "unknown keys"), ("[capabilities]\nheads = []", "capabilities.heads"), ("tolerance = 'lax'", "lax"),
        ("[capabilities]\nfeatures = ['windows']", "features names windows; there are alibi, dv"),
        ("[capabilities]\ncaches = ['huge']", "giant, strided"), ("[capabilities]\ngraphs = 'no'", "true or false"),
        ("[capabilities]\ndtypes = 3", "dtypes"), ("[[waivers]]\ncase='x'", "issue"), ("a =", "x.toml"),
    ):  # fmt: skip
        with pytest.raises(ManifestError, match=part.replace("[", "\\[")):
            read(text, "x.toml")


def test_a_manifest_is_read_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin does when it is imported is the worker's affair. Duties that the suite has written come first."""
    package = tmp_path / "dougong_loud"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "compat.toml").write_text('[capabilities]\ndtypes = ["float16"]\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    manifest = find({"backend": "loud"})
    assert manifest.source == "dougong_loud/compat.toml" and manifest.declares("dtype:float16")
    assert find({"backend": "cpu"}, None, ("dougong_loud",)).source == "dougong_compat/manifests/cpu.toml"
