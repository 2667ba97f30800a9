"""Several workers on one device, and runs that are cut: who is asked what, and what the report says of the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dougong_compat.case import Case
from dougong_compat.cases import collect_profile
from dougong_compat.crew import is_heavy, shares
from dougong_compat.fuzzing import of_a_profile
from dougong_compat.manifest import Manifest, find
from dougong_compat.outcome import Result
from dougong_compat.pool import Clock, OpenError, Target, Worker
from dougong_compat.problem import DEFAULTS
from dougong_compat.report.build import schema
from dougong_compat.report.junit import junit
from dougong_compat.report.schema_check import violations
from dougong_compat.report.verify import faults
from dougong_compat.resolve import Resolver
from dougong_compat.resume import same_run, within
from dougong_compat.run import Runner
from dougong_compat.selftest.lab import TODAY
from dougong_compat.session import Session, run_profile, unopened

HONEST = Target("honest-tiled", ("dougong_compat.selftest.honest",))
FACTS = {
    "backend": "cpu", "device_type": "cuda", "dtypes": ["bfloat16"],
    "layouts": [{"name": "nhd", "planes": ["b n h d", "b n h d"], "default": 16, "blocks": [16, 32]}],
}  # fmt: skip


def requests_of(profile: str) -> list[dict[str, Any]]:
    resolver = Resolver(FACTS, find({**FACTS, "backend": "cpu"}))
    return [resolver.request(case, declared=True) for case in collect_profile(profile)]


def test_every_case_is_in_one_share() -> None:
    requests = requests_of("core")
    alone, heavy, cut = shares(requests, 8)
    assert sorted([*alone, *heavy, *(at for share in cut for at in share)]) == list(range(len(requests)))
    assert [requests[at]["id"] for at in alone] == ["L0/device/memory"]
    assert len(heavy) >= 10 and all(is_heavy(requests[at]) and requests[at]["heavy"] for at in heavy)
    assert max(len(share) for share in cut) <= 40
    engine = [len(share) for share in cut if requests[share[0]]["kind"] == "engine"]
    assert engine == [len(share) for share in cut[: len(engine)]] and max(engine) <= 4


def test_cases_of_one_kernel_shape_stay_together() -> None:
    """A kernel that compiles when first used is then compiled in one process."""
    requests = requests_of("core")
    _, _, cut = shares(requests, 8)
    where: dict[str, list[int]] = {}
    for index, share in enumerate(cut):
        for at in share:
            params = {**DEFAULTS, **requests[at]["params"]}
            if requests[at]["kind"] == "attention":
                # all that cases of L1/attention differ in, but for lengths and contents
                fixed = (
                    "rows",
                    "tail",
                    "table_tail",
                    "dead",
                    "width",
                    "slack",
                    "q_pack",
                    "host_len",
                    "write",
                    "values",
                )
                shape = {name: value for name, value in params.items() if name not in (*fixed, "guard", "spare")}
                where.setdefault(json.dumps(shape, sort_keys=True), []).append(index)
    apart = sum(len(set(found)) > 1 for found in where.values())
    assert len(where) > 1000 and apart < len(where) / 20


def test_one_worker_is_asked_everything_in_order() -> None:
    requests = requests_of("smoke")
    assert shares(requests, 1) == ([], [], [list(range(len(requests)))])
    assert shares([], 1) == ([], [], [])


def selection(*, interrupt: int = 0, **more: Any) -> tuple[dict[str, Any], list[Case]]:
    """A run of a few cases; ``interrupt``: the user loses patience after so many results."""
    seen = 0

    def came(result: Result) -> None:
        nonlocal seen
        seen += 1
        if seen == interrupt:
            raise KeyboardInterrupt

    return run_profile(Session(HONEST, "smoke", only=("L1/attention/mandatory/*-d64",), **more), on_result=came)


@pytest.mark.prove
@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupted_run_reports_what_it_has(jobs: int) -> None:
    report, cases = selection(interrupt=5, jobs=jobs)
    done = [case["id"] for case in report["cases"]]
    assert 5 <= len(done) < len(cases) and sorted(done + report["not_run"]) == sorted(case.id for case in cases)
    assert report["verdict"] == "INVALID" and "interrupted" in " ".join(report["reasons"])
    assert all(case["outcome"] == "PASS" for case in report["cases"]), "the interrupt is nobody's crash"
    assert violations(json.loads(json.dumps(report)), schema()) == [] and faults(report) == []
    assert junit(report).count("not run") == len(report["not_run"])


@pytest.mark.prove
def test_a_spent_budget_asks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is over before the first case: nothing has an outcome, and nothing is called a failure."""
    monkeypatch.setattr("dougong_compat.session.Clock", lambda budget: Clock(0.0))
    report, cases = selection(budget=1.0)
    assert report["cases"] == [] and report["not_run"] == [case.id for case in cases]
    assert "the budget of 1 s was spent" in " ".join(report["reasons"])


def test_a_case_under_way_when_time_is_up_has_no_outcome(lab: Any) -> None:
    lab.worker.open(Target("bad-hang", ("dougong_compat.selftest.cheats",)))
    request = Resolver(lab.worker.facts, find({**lab.worker.facts, "backend": "honest-tiled"})).request(
        next(case for case in collect_profile("smoke") if case.id == "L1/attention/mandatory/decode-h4k1-d64"),
        declared=True,
    )
    assert list(lab.worker.ask([request, request], Clock(0.5))) == []


def test_a_worker_that_cannot_come_back_costs_its_cases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(HONEST)
    starts = []

    def start() -> dict[str, Any]:
        starts.append(1)
        raise OpenError("no device any more")

    monkeypatch.setattr(worker, "start", start)
    with pytest.raises(OpenError):
        list(worker.ask([{"id": "a"}]))
    worker.started = True  # it ran before
    answers = list(worker.ask([{"id": str(at)} for at in range(10)]))
    assert [answer.fate for answer in answers] == ["crash"] * 10 and len(starts) == 4
    assert "no device any more" in answers[-1].detail


def test_a_backend_that_cannot_be_opened_gets_a_report() -> None:
    report = unopened(Session(Target("nobody"), "smoke"), OpenError("backend 'nobody' is not known"))
    assert violations(json.loads(json.dumps(report)), schema()) == [] and faults(report) == []
    assert report["verdict"] == "INVALID" and "nobody" in report["reasons"][0]
    assert len(report["not_run"]) == len(collect_profile("smoke"))


@pytest.mark.prove
def test_several_workers_find_what_one_finds() -> None:
    one, _ = selection()
    three, _ = selection(jobs=3)
    facts = [[(case["id"], case["outcome"], case.get("margin")) for case in report["cases"]] for report in (one, three)]
    assert facts[0] == facts[1] and (one["jobs"], three["jobs"]) == (1, 3)


@pytest.mark.prove
def test_a_run_that_was_cut_goes_on() -> None:
    """The whole's report is that of one run: every case once, the totals of both parts, both parts named."""
    whole, cases = selection()
    left = [case.id for case in cases[1::2]]
    first = json.loads(json.dumps(whole))
    first["cases"] = [row for row in first["cases"] if row["id"] not in left]
    first["cases"][0]["message"] = "of the first run"
    first["totals"]["cases"], first["not_run"] = len(first["cases"]), left
    again, _ = selection(resume=first)
    assert [row["id"] for row in again["cases"]] == [row["id"] for row in whole["cases"]]
    assert again["cases"][0]["message"] == "of the first run" and again["totals"] == whole["totals"]
    assert again["not_run"] == [] and [part["cases"] for part in again["parts"]] == [len(first["cases"]), len(left)]
    assert violations(json.loads(json.dumps(again)), schema()) == []


@pytest.mark.parametrize("change", ["profile", "suite", "device", "kernels", "manifest"])
def test_another_runs_results_are_not_added(change: str) -> None:
    facts: dict[str, Any] = {"backend": "x", "plugin": "x", "version": "1", "device": "one", "torch": "2"}
    manifest = Manifest("x", {}, frozenset({"engine"})).to_json()
    report = {"profile": "core", "environment": dict(facts), "suite": {"version": "1", "cases_sha256": "a"}}
    report["manifest"] = {**manifest, "source": "elsewhere"}
    same_run(report, facts, manifest, "core", "a")
    if change == "profile":
        report["profile"] = "full"
    elif change == "suite":
        report["suite"] = {"version": "1", "cases_sha256": "b"}
    elif change == "device":
        report["environment"] = {**facts, "device": "another"}
    elif change == "kernels":
        report["environment"] = {**facts, "kernels": [{"provider": "faster"}]}
    else:  # what was judged with more room does not stand
        report["manifest"]["tolerance"] = "relaxed"
    with pytest.raises(ValueError, match="run the profile anew"):
        same_run(report, facts, manifest, "core", "a")


def test_a_smaller_profiles_report_is_gone_on_with() -> None:
    assert [within(profile) for profile in ("smoke", "full")] == [("smoke",), ("smoke", "core", "full")]
    assert within("certified") == ("certified",), "its inputs end at a closed page: no other profile's do"


@pytest.mark.prove
def test_core_goes_on_from_smoke() -> None:
    """A report of another profile is held to that profile's cases, and only what it lacks is run."""
    smoke = json.loads(json.dumps(run_profile(Session(HONEST, "smoke", only=("L1/op/silu_mul",)))[0]))
    ran = {row["id"] for row in smoke["cases"]}
    more, cases = run_profile(Session(HONEST, "core", only=("L1/op/silu_mul",), resume=smoke))
    assert ran < {case.id for case in cases} and more["parts"][1]["cases"] == len(cases) - len(ran)
    assert more["profile"] == "core" and more["not_run"] == []


def test_the_line_that_runs_a_case_again_names_what_the_run_was_given() -> None:
    session = Session(Target("mydev", ("my.plugin",)), "certified", "my compat.toml")
    assert session.options == " --plugin my.plugin --manifest 'my compat.toml' --guard"
    assert Session(HONEST).options == "", "the suite knows where its own backends are"


@pytest.mark.prove
def test_the_full_profile_searches_too(lab: Any) -> None:
    """Nothing on an honest kernel; on a wrong one a case of the smallest batch, with the line that runs it again."""
    for backend, module, failed in (("honest-tiled", "honest", False), ("cheat-zeros", "cheats", True)):
        facts = lab.worker.open(Target(backend, (f"dougong_compat.selftest.{module}",)))
        runner = Runner(lab.worker, find({**facts, "backend": "honest-tiled"}), TODAY)
        found = of_a_profile(runner, Clock(), " --plugin x")
        assert found.report["failed"] is failed and found.report["examples"] >= 1 and found.problems == []
        assert [result.case_id.rpartition("/")[0] for result in found.results] == ["L1/fuzz"] * failed
    assert "--plugin x --seed" in found.results[0].reproduce and '"rows": [[1, 1]]' in found.results[0].reproduce
    assert of_a_profile(runner, Clock(0.0)).problems, "a search that was cut proves nothing"
