"""What plugins add to a run, and what they may not: kernels for another's backend, waivers for it, ids of the suite."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from dougong_compat.case import Case, KnownFailure
from dougong_compat.cases.corpus import saved_cases
from dougong_compat.contributed import describe, receive
from dougong_compat.manifest import find
from dougong_compat.pool import Target, Worker
from dougong_compat.report.verify import faults
from dougong_compat.run import Runner
from dougong_compat.selftest.lab import TODAY
from dougong_compat.session import Session, run_profile
from dougong_compat.template.write import write_package

SUITE_CASE = "L1/attention/mandatory/decode-h4k1-d64"

STRANGER = """
from dougong.plugins import ABI, KernelSpec, hookimpl
from dougong_compat.case import KnownFailure
from dougong_compat.selftest.kernels import EagerKernel

class Zeros(EagerKernel):
    def run(self, plan, layer, q, kv, *, out, lse=None):
        out.zero_()

@hookimpl
def dougong_kernels(device):
    if device.type == "cpu":
        spec = dict(op="attention", provider="zeros", target="stranger:Zeros", layouts=("nhd",), priority=999)
        yield KernelSpec(abi=ABI, **spec)

@hookimpl
def dougong_compat_cases(device):
    return [KnownFailure("*", "https://example.org/1", "2999-01-01")]
"""

HOOK = """

@hookimpl
def dougong_compat_cases(device):
    import datetime
    from dougong_compat.case import Case, KnownFailure
    from dougong_compat.cases.make import attention_case

    rows = {"rows": [[1, 9]], "H": 4, "K": 1, "D": 64}
    yield attention_case("plugin/newdev", "mine", rows, profile="smoke")
    yield Case("L1/plugin/newdev/broken", "L1", "op", {"op": "no such op"}, profile="smoke")
    day = datetime.datetime.now(datetime.timezone.utc).date() + datetime.timedelta(days=30)
    yield KnownFailure("L1/plugin/newdev/bro*", "https://example.org/7", day, "not written yet")
"""


@pytest.mark.prove
def test_another_plugins_kernels_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the cases of calls nor in those of the engine, and the report says that they were left out."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker(Target("honest-tiled", ("dougong_compat.selftest.honest", "stranger"))) as worker:
        facts = worker.start()
        assert "attention: zeros (stranger)" in facts["left_out"]
        assert {kernel["plugin"] for kernel in facts["kernels"]} == {"dougong_compat.selftest.honest"}
        assert facts["contributed"] == [], "nor may another plugin waive"
        runner = Runner(worker, find(facts), TODAY)
        from dougong_compat.cases import find_case

        cases = [find_case(name) for name in (SUITE_CASE, "L3/engine/length/17-chunk64-own")]
        results = list(runner.run([case for case in cases if case is not None]))
        assert [result.outcome.value for result in results] == ["PASS", "PASS"], results
        assert results[0].provider == "tiled (dougong_compat.selftest.honest)"


def test_a_plugins_own_cases_run_and_its_known_failures_are_waived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package("newdev", tmp_path)
    hooks = tmp_path / "dougong_newdev" / "__init__.py"
    text = hooks.read_text()
    hooks.write_text(text[: text.index("@hookimpl\ndef dougong_compat_cases")] + HOOK)
    monkeypatch.syspath_prepend(str(tmp_path))
    session = Session(Target("newdev", ("dougong_newdev",)), "smoke", only=("L1/plugin/", SUITE_CASE))
    report, cases = run_profile(session)
    outcomes = {case["id"]: case["outcome"] for case in report["cases"]}
    assert outcomes == {SUITE_CASE: "PASS", "L1/plugin/newdev/mine": "PASS", "L1/plugin/newdev/broken": "WAIVED"}
    assert [case.id for case in cases] == list(outcomes)
    assert report["manifest"]["waivers"][0]["issue"] == "https://example.org/7"
    assert report["levels"]["L1"]["executed"] == 1, "a plugin's own cases fill no floor"
    assert not [text for text in faults(report) if "another set" in text]


def test_what_is_no_case_makes_the_run_invalid() -> None:
    case = Case("L1/plugin/x/a", "L1", "attention", {}, profile="smoke")
    answers = [
        ("px", case),
        ("px", case),
        ("px", Case(SUITE_CASE, "L1", "attention")),
        ("px", Case("L1/plugin/x/b", "L1", "dance")),
        ("px", Case("L9/plugin/x/c", "L9", "attention")),
        ("px", KnownFailure("L1/*", "https://example.org/1", "soon")),  # type: ignore[arg-type]
        ("px", KnownFailure("L1/*", "https://example.org/1", datetime.date(2026, 1, 9))),
        ("px", "nonsense"),
    ]
    got = receive({"backend": "x", "contributed": describe(answers)}, "smoke", (SUITE_CASE,))
    assert [one.id for one in got.cases] == ["L1/plugin/x/a"]
    assert [one.expires.isoformat() for one in got.waivers] == ["2026-01-09"]
    for problem, part in zip(got.problems, ("twice", "must be called", "kind 'dance'", "'L9'", "'soon'", "'nonsense'")):
        assert problem.startswith("plugin 'px'") and part in problem, problem
    assert len(got.problems) == 6


def test_saved_failures_become_cases(tmp_path: Path) -> None:
    (tmp_path / "abc.json").write_text(
        '{"params": {"rows": [[1, 3]], "H": 2, "K": 2}, "seed": 5, "message": "far off"}'
    )
    (case,) = saved_cases(tmp_path, "mydev")
    assert (case.id, case.actual_seed, case.kind) == ("L1/plugin/mydev/abc", 5, "attention")
    assert saved_cases(tmp_path / "none", "mydev") == []
