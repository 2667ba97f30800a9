"""``python -m dougong_compat.selftest.harvest [NAME…]``: search planted bugs, add what is found to corpus.json.

For every bug that can be planted in a kernel the search looks for a failing call and shrinks it; what it finds is a
case from then on. Bugs that no single attention call shows (writes, replays, the block manager) give none.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dougong_compat.cases.make import attention_case
from dougong_compat.fuzzing import run_one, search
from dougong_compat.pool import Worker
from dougong_compat.selftest.backends import HONEST
from dougong_compat.selftest.mutants import all_mutants
from dougong_compat.selftest.mutants.mutant import Mutant
from dougong_compat.target import OpenError, Target

__all__ = ["harvest"]


def harvest(only: Sequence[str] = (), count: int = 60) -> Iterator[dict[str, Any]]:
    """Entries of corpus.json, at most one for each planted bug whose name holds one of ``only``; no two alike."""
    seen: set[str] = set()
    with Worker(Target("honest-eager", (HONEST["honest-eager"],)), timeout=5.0) as worker:
        yield from _harvest(worker, only, count, seen)


def _harvest(worker: Worker, only: Sequence[str], count: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    for mutant in all_mutants():
        if only and not any(text in mutant.name for text in only):
            continue
        if mutant.manager or mutant.equivalent or not mutant.killed_by.startswith(("L1/attention", "L1/regression")):
            continue
        target = Target(mutant.backend, (HONEST[mutant.backend],), mutant.name)
        try:
            failure = search(target, count=count, seed=0, worker=worker)["failure"]
        except OpenError:
            continue
        text = json.dumps(failure and failure["params"], sort_keys=True)
        if failure is None or text in seen or not _passes_without(worker, mutant, failure):
            continue
        seen.add(text)
        yield {
            "name": f"{mutant.name}-{failure['id'].rpartition('/')[2]}", "params": failure["params"],
            "seed": failure["seed"], "note": mutant.name,
        }  # fmt: skip


def _passes_without(worker: Worker, mutant: Mutant, failure: dict[str, Any]) -> bool:
    """Whether the honest kernel answers rightly: what fails with and without the bug says nothing of it."""
    case = attention_case("fuzz", failure["id"].rpartition("/")[2], failure["params"])
    worker.open(Target(mutant.backend, (HONEST[mutant.backend],)))
    result, _ = run_one(worker, dataclasses.replace(case, seed=failure["seed"]))
    if result.outcome.bad:
        print(f"{mutant.name}: fails without the bug too: {result.message[:200]}", file=sys.stderr)
    return not result.outcome.bad


def main() -> None:
    """Write after every find: a search may be cut short."""
    path = Path(str(resources.files("dougong_compat").joinpath("corpus.json")))
    entries = {entry["note"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    for entry in harvest(sys.argv[1:]):
        entries[entry["note"]] = entry
        path.write_text(json.dumps(list(entries.values()), indent=1) + "\n", encoding="utf-8")
        print(entry["name"], flush=True)


if __name__ == "__main__":
    main()
