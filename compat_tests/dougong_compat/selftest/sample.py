"""A report as a run would write it, made up: for the tests of what reads reports."""

from __future__ import annotations

import datetime
from typing import Any

from dougong_compat.cases import collect_profile
from dougong_compat.honesty import verdict_of
from dougong_compat.manifest import read
from dougong_compat.outcome import Outcome, Result
from dougong_compat.report.build import build

__all__ = ["sample_report"]

_TODAY = datetime.date(2026, 1, 1)


def sample_report(bad: int = 0, not_run: int = 0) -> dict[str, Any]:
    """The smoke profile: the first ``bad`` cases failed, the last ``not_run`` were not come to, the others passed."""
    cases = collect_profile("smoke")
    ran = cases[: len(cases) - not_run]
    results = [
        Result(case.id, case.level, Outcome.PASS, margin=0.1 + index % 7 / 20, seconds=0.01, seed=case.actual_seed)
        for index, case in enumerate(ran)
    ]
    for result in results[:bad]:
        result.outcome = Outcome.FAIL
        result.message = "wrong <tensor> & co"
        result.link = "https://github.com/a/b/issues/1"
    manifest = read('[capabilities]\ndtypes = ["float32"]\nfeatures = ["window"]\n', "x")
    verdict = verdict_of("smoke", cases, results, manifest, _TODAY, cut="the run was interrupted" if not_run else "")
    facts = {
        "backend": "mydev",
        "device": "A <device>",
        "device_type": "cpu",
        "kernels": [],
        "layouts": [],
        "facts": {},
    }
    return build(
        profile="smoke", facts=facts, manifest=manifest, cases=cases, results=results, verdict=verdict, seconds=1.5,
        not_run=[case.id for case in cases[len(ran) :]],
    )  # fmt: skip
