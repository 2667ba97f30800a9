"""The report: schema, JUnit, HTML, badge, diff, verify."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dougong_compat.report.badge import badge
from dougong_compat.report.build import schema
from dougong_compat.report.diff import diff
from dougong_compat.report.schema_check import violations
from dougong_compat.report.verify import faults
from dougong_compat.report.write import write_all
from dougong_compat.selftest.sample import sample_report as make


def test_a_report_keeps_its_schema() -> None:
    for bad in (0, 3):
        report = json.loads(json.dumps(make(bad)))
        assert violations(report, schema()) == []
        assert faults(report) == []
        assert report["verdict"] == ("NOT" if bad else "CONFORMANT")
        assert report["totals"]["fail"] == bad and report["totals"]["pass"] == report["totals"]["cases"] - bad


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("verdict"),
        lambda r: r.update(verdict="GREAT"),
        lambda r: r["totals"].update({"pass": 9999}),
        lambda r: r["cases"].pop(),
        lambda r: r["cases"].append(r["cases"][0]),
        lambda r: r["cases"][0].update(outcome="FAIL"),
        lambda r: r["suite"].update(cases_sha256="0" * 64),
        lambda r: [case.update(outcome="UNSUPPORTED") for case in r["cases"]],
        lambda r: r["cases"][0].update(surprise=1),
        lambda r: r["cases"][0].update(seed=1),
        lambda r: r["cases"][0].update(margin=1.5),
        lambda r: r["levels"]["L1"].update(passed=1),
        lambda r: r["manifest"].update(waivers=[{"case": "L1/*", "issue": "later", "expires": "2026-12-01"}]),
        lambda r: r["manifest"].update(waivers=[{"case": "*", "issue": "https://a.b/1", "expires": "2099-01-01"}]),
    ],
)
def test_verify_finds_a_spoilt_report(spoil: Any) -> None:
    report = json.loads(json.dumps(make()))
    spoil(report)
    assert faults(report)


def test_files_of_a_report(tmp_path: Path) -> None:
    report = make(2)
    write_all(report, tmp_path, {case["id"]: ("feature:window",) for case in report["cases"]})
    tree = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert sum(int(suite.get("failures", 0)) for suite in tree) == 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "dougong compat repro --backend mydev" in page and "&lt;tensor&gt;" in page and "<script" not in page
    assert "feature:window" in page and "<svg" in page and "prefers-color-scheme:dark" in page
    assert json.loads((tmp_path / "badge.json").read_text())["color"] == "red"


def test_badge_shows_a_relaxed_tolerance() -> None:
    report = make()
    assert badge(report)["color"] == "brightgreen"
    report["manifest"]["tolerance"] = "relaxed"
    assert badge(report)["color"] == "yellow" and "relaxed" in badge(report)["message"]


def test_badge_shows_waivers_and_counts_the_suites_cases_only() -> None:
    report = make()
    own = [
        {"id": f"L1/plugin/mydev/{n}", "level": "L1", "outcome": "PASS", "seconds": 0, "seed": 1} for n in range(999)
    ]
    report["cases"] += own
    report["totals"].update({"pass": report["totals"]["pass"] + len(own), "waived": 3})
    assert badge(report)["message"] == f"conformant (smoke, {len(report['cases']) - len(own)} passed, 3 waived)"
    assert badge(report)["color"] == "yellow"


def test_diff_shows_what_broke_and_what_drifts() -> None:
    old, new = make(), copy.deepcopy(make())
    new["cases"][0]["outcome"] = "FAIL"
    new["cases"][1]["margin"] = 0.8
    change = diff(old, new)
    assert [one["id"] for one in change["broken"]] == [old["cases"][0]["id"]]
    assert [one["id"] for one in change["drifted"]] == [old["cases"][1]["id"]]
    assert diff(new, old)["mended"] and not diff(old, old)["broken"]
