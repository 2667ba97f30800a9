"""``python -m dougong_compat.selftest.harvest``: write corpus.json anew.

For every bug that can be planted in a kernel the search looks for a failing call and shrinks it; what it finds is a
case from then on. Bugs that no single attention call shows (writes, replays, the block manager) give none.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from dougong_compat.fuzzing import search
from dougong_compat.selftest.backends import HONEST
from dougong_compat.selftest.mutants import all_mutants
from dougong_compat.target import OpenError, Target

__all__ = ["harvest"]


def harvest(count: int = 80) -> list[dict[str, Any]]:
    """Entries of corpus.json, at most one for each planted bug, no two alike."""
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    for mutant in all_mutants():
        if mutant.manager or mutant.equivalent or not mutant.killed_by.startswith(("L1/attention", "L1/regression")):
            continue
        target = Target(mutant.backend, (HONEST[mutant.backend],), mutant.name)
        try:
            failure = search(target, count=count, seed=0)["failure"]
        except OpenError:
            continue
        text = json.dumps(failure and failure["params"], sort_keys=True)
        if failure is None or text in seen:
            continue
        seen.add(text)
        entries.append(
            {
                "name": f"{mutant.name}-{failure['id'].rpartition('/')[2]}", "params": failure["params"],
                "seed": failure["seed"], "note": mutant.name,
            }
        )  # fmt: skip
        print(f"{mutant.name}: {text}", flush=True)
    return entries


if __name__ == "__main__":
    found = harvest()
    path = Path(str(resources.files("dougong_compat").joinpath("corpus.json")))
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
