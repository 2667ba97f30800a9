"""One pytest test per case, all answered by one run of the suite, and one for the verdict."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from dougong_compat.case import PROFILES
from dougong_compat.cases import collect_profile
from dougong_compat.commands.run import target_of
from dougong_compat.session import Session, run_profile, unopened
from dougong_compat.target import OpenError

__all__ = ["pytest_generate_tests", "test_case", "test_verdict"]


@lru_cache(maxsize=4)
def _report(backend: str, profile: str, plugins: tuple[str, ...], manifest: str | None, jobs: int) -> dict[str, Any]:
    """The whole profile is run once, when the first test asks. A backend that cannot be opened has a report too."""
    session = Session(target_of(backend, list(plugins)), profile, manifest, jobs=jobs)
    try:
        report, _ = run_profile(session)
    except OpenError as error:
        report = unopened(session, error)
    report["by_id"] = {case["id"]: case for case in report["cases"]}
    return report


def _asked(config: pytest.Config, module: Any) -> tuple[str, str, tuple[str, ...], str | None, int]:
    option = config.getoption
    backend = getattr(module, "COMPAT_BACKEND", None) or option("--dougong-backend", default=None)
    profile = getattr(module, "COMPAT_PROFILE", None) or option("--dougong-profile", default=None) or "core"
    plugins = tuple(getattr(module, "COMPAT_PLUGINS", ()) or option("--dougong-plugin", default=None) or ())
    jobs = getattr(module, "COMPAT_JOBS", None) or option("--dougong-jobs", default=1)
    return backend or "", profile, plugins, getattr(module, "COMPAT_MANIFEST", None), jobs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `test_case` over the profile and hand both tests the backend."""
    if "compat_asked" not in metafunc.fixturenames:
        return
    asked = _asked(metafunc.config, metafunc.module)
    if asked[1] not in PROFILES:
        raise pytest.UsageError(f"profile {asked[1]!r}: one of {', '.join(PROFILES)}")
    if not asked[0]:
        raise pytest.UsageError("name a backend: --dougong-backend NAME, or COMPAT_BACKEND in the test module")
    if "compat_case" in metafunc.fixturenames:
        ids = [case.id for case in collect_profile(asked[1])]
        metafunc.parametrize(("compat_asked", "compat_case"), [(asked, name) for name in ids], ids=ids)
    else:
        metafunc.parametrize("compat_asked", [asked], ids=[asked[0]])


def test_case(compat_asked: Any, compat_case: str) -> None:
    """The outcome of one case."""
    report = _report(*compat_asked)
    result = report["by_id"].get(compat_case)
    if result is None:
        pytest.fail(f"not run: {'; '.join(report['reasons'])}", pytrace=False)
    if result["outcome"] in ("UNSUPPORTED", "WAIVED"):
        pytest.skip(f"{result['outcome']}: {result.get('message', '')[:200]}")
    assert result["outcome"] == "PASS", f"{result.get('message', '')}\n{result.get('reproduce', '')}"


def test_verdict(compat_asked: Any) -> None:
    """Passing cases are not enough: the run must be whole, above its floors, and without tricks."""
    report = _report(*compat_asked)
    assert report["verdict"] == "CONFORMANT", "\n".join(report["reasons"])
