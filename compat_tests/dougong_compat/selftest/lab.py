"""One worker in which any demonstration backend can be put under test: for the suite's own tests."""

from __future__ import annotations

import datetime
from typing import Any

from dougong_compat.cases import find_case
from dougong_compat.manifest import find
from dougong_compat.outcome import Result
from dougong_compat.pool import Target, Worker
from dougong_compat.run import Runner

__all__ = ["TODAY", "Lab"]

TODAY = datetime.date(2026, 1, 1)


class Lab:
    """One worker process in which any demonstration backend can be put under test."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def judge(self, case_id: str, backend: str = "honest-tiled", *, manifest: Any = None, **more: Any) -> Result:
        """The result of one case on one of the honest backends or cheats."""
        plugin = (
            "dougong_compat.selftest.cheats"
            if backend.startswith(("cheat", "bad"))
            else "dougong_compat.selftest.honest"
        )
        target = Target(backend, (plugin,), more.get("mutant", ""))
        facts = self.worker.open(target)
        name = backend if backend.startswith("honest") else "honest-tiled"
        declared = manifest or find({**facts, "backend": name}, None, ())
        case = find_case(case_id)
        assert case is not None, case_id
        return next(iter(Runner(self.worker, declared, TODAY).run([case])))
