"""The commands as a user types them, their exit codes, and the suite under plain pytest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dougong_compat.case import seed_of
from dougong_compat.cases import collect_profile
from dougong_compat.commands.app import build_app
from dougong_compat.session import Session, unopened
from dougong_compat.target import Target

CASE = "L1/attention/mandatory/decode-h4k1-d64"
APP = build_app()


def call(*words: str) -> Result:
    return CliRunner().invoke(APP, list(words))


def report_file(folder: Path, **changes: Any) -> Path:
    """A report of a run that came to nothing: enough for the commands that read one."""
    report = unopened(Session(Target("mydev"), "smoke"), RuntimeError("no driver")) | changes
    file = folder / "report.json"
    file.write_text(json.dumps(report))
    return file


def test_list_names_the_cases_of_a_profile() -> None:
    found = call("list", "--profile", "smoke", "--json", "-k", "L1/attention/mandatory/*")
    rows = json.loads(found.stdout)
    assert found.exit_code == 0 and CASE in {row["id"] for row in rows} and all(row["mandatory"] for row in rows)
    assert call("list", "--profile", "smoke").stdout.splitlines() == [case.id for case in collect_profile("smoke")]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("list", "--profile", "huge"), "one of smoke, core, full, certified"),
        (("run", "--backend", "cpu", "--profile", "huge"), "one of smoke, core, full, certified"),
        (("run",), "--backend"),
        (("run", "--backend", "cpu", "--jobs", "0"), "--jobs"),
        (("dance",), "dance"),
        (("--dance",), "--dance"),
        (("repro", "--backend", "cpu", "--seed", "1", "--params", "{", CASE), "JSONDecodeError"),
        (("verify", "no-such-report.json"), "No such file"),
        pytest.param(("support", "--backend", "nobody"), "nobody", marks=pytest.mark.prove),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_3(words: tuple[str, ...], part: str) -> None:
    found = call(*words)
    assert found.exit_code == 3 and part in found.stderr + found.stdout, found.stderr
    assert "Traceback" not in found.stderr


def test_verify_and_diff_and_report_read_a_report(tmp_path: Path) -> None:
    file = report_file(tmp_path)
    assert call("verify", str(file)).exit_code == 0
    assert call("report", str(file), "--out", str(tmp_path / "out")).exit_code == 0
    assert "no driver" in (tmp_path / "out" / "report.html").read_text()
    assert call("diff", str(file), str(file)).exit_code == 0
    (tmp_path / "b").mkdir()
    spoilt = report_file(tmp_path / "b", verdict="CONFORMANT")
    found = call("verify", str(spoilt), "--json")
    assert found.exit_code == 2 and "CONFORMANT with" in json.loads(found.stdout)["faults"][0]


@pytest.mark.prove
def test_repro_says_all_that_is_known_of_a_case() -> None:
    found = call("repro", "--backend", "honest-tiled", "--json", CASE)
    body = json.loads(found.stdout)
    assert found.exit_code == 0 and body["outcome"] == "PASS" and body["seed"] == seed_of(CASE)
    assert body["params"]["D"] == 64 and 0 < body["margin"] < 1


@pytest.mark.prove
def test_fuzz_finds_shrinks_saves_and_tries_again_first(tmp_path: Path) -> None:
    """Nothing on an honest kernel; on one that answers zeros the smallest call, found again from its file."""
    good = call("fuzz", "--backend", "honest-tiled", "--count", "60", "--save", str(tmp_path / "good"), "--json")
    assert good.exit_code == 0 and json.loads(good.stdout)["failure"] is None and not (tmp_path / "good").exists()
    bad = ("--backend", "cheat-zeros", "--plugin", "dougong_compat.selftest.cheats", "--save", str(tmp_path), "--json")
    found = call("fuzz", "--count", "80", *bad)
    failure = json.loads(found.stdout)["failure"]
    assert found.exit_code == 1 and failure["params"]["rows"] == [[1, 1]]
    assert [file.stem for file in tmp_path.glob("*.json")] == [failure["id"].rpartition("/")[2]]
    again = json.loads(call("fuzz", "--count", "1", *bad).stdout)
    assert again["tried"] == 1 and again["failure"]["params"] == failure["params"]


@pytest.mark.prove
def test_support_counts_what_is_declared() -> None:
    body = json.loads(call("support", "--backend", "honest-tiled", "--json").stdout)
    assert 0 < body["declared_cases"] < body["core_cases"]
    assert (
        body["capabilities"]["feature:softcap"]["declared"] and not body["capabilities"]["feature:latent"]["declared"]
    )


@pytest.mark.prove
def test_perf_measures_ceilings_first_and_no_row_is_above_one(tmp_path: Path) -> None:
    found = call("perf", "--backend", "honest-eager", "--quick", "--json", "--out", str(tmp_path / "rows.json"))
    rows = json.loads(found.stdout)
    assert [row["name"] for row in rows[:3]] == ["ceiling: copy", "ceiling: read", "ceiling: matmul"]
    timed = [row for row in rows[3:] if row.get("share") is not None]
    assert len(timed) >= 4 and all(row["share"] > 0 and row["microseconds"] > 0 for row in timed)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert found.exit_code == (2 if any(row.get("invalid") for row in rows) else 0)


@pytest.mark.prove
@pytest.mark.timeout(300)
def test_the_suite_under_plain_pytest(tmp_path: Path) -> None:
    """`pytest --pyargs dougong_compat.suite`: one test a case, refusals as skips, and the verdict as a test."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "dougong_compat.suite", "-q", "-p", "no:cacheprovider"]
    command += ["--dougong-backend", "cheat-zeros", "--dougong-plugin", "dougong_compat.selftest.cheats"]
    command += ["--dougong-profile", "smoke", "--rootdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, cwd=tmp_path)
    tail = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and all(word in tail for word in ("passed", "failed", "skipped")), done.stdout[-2000:]
    failed = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert any("test_case[L1/attention/mandatory/" in line for line in failed) and not any(
        "L0/" in line for line in failed
    )
    assert any("test_verdict[cheat-zeros]" in line for line in failed)


@pytest.mark.prove
def test_plain_pytest_on_a_backend_that_cannot_be_opened_ends_soon(tmp_path: Path) -> None:
    """It is tried once, and every test says why it did not run."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "dougong_compat.suite", "-q", "-p", "no:cacheprovider"]
    command += ["--dougong-backend", "nobody", "--dougong-profile", "smoke", "--rootdir", str(tmp_path), "--tb=line"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 1 and f"{len(collect_profile('smoke')) + 1} failed" in done.stdout.splitlines()[-1]
    assert "the backend could not be opened" in done.stdout
