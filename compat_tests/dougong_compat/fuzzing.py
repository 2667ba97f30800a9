"""Searching for a failing batch with Hypothesis: shrunk, saved, and tried first the next time."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.attention import HEADS
from dougong_compat.cases.make import FEATURES, attention_case
from dougong_compat.manifest import Manifest, find
from dougong_compat.outcome import Result
from dougong_compat.pool import Target, Worker
from dougong_compat.resolve import Resolver
from dougong_compat.run import Runner

__all__ = ["examples", "run_one", "search"]


def run_one(
    worker: Worker, case: Case, manifest_path: str | None = None, manifest: Manifest | None = None
) -> tuple[Result, dict[str, Any]]:
    """Run one case; (result, the worker's whole message)."""
    if worker.socket is None:
        worker.start()
    declared = manifest or find(worker.facts, manifest_path, worker.target.plugins)
    runner = Runner(worker, declared, datetime.datetime.now(datetime.timezone.utc).date())
    known = case.mandatory or not declared.undeclared(case.needs)
    request = runner.resolver.request(case, declared=known)
    answer = next(iter(worker.ask([request])))
    return runner.judge(case, known, request, answer), answer.message


def examples(blocks: list[int]) -> Any:
    """A Hypothesis strategy of attention parameters: ragged batches with features, simplest first."""
    from hypothesis import strategies as st

    length = st.one_of(
        st.integers(1, 40),
        st.builds(lambda k, d: max(1, k * 16 + d), st.integers(1, 6), st.integers(-1, 1)),
        st.integers(1, 400),
    )
    decode = length.map(lambda kv: [1, kv])
    other = st.tuples(st.integers(0, 20), st.integers(0, 60)).map(lambda pair: [pair[0], pair[0] + pair[1]])
    past = st.tuples(st.integers(2, 9), st.integers(0, 8)).map(list)

    def build(
        row_lists: tuple[list[Any], list[Any]], heads: tuple[int, int], feature: str, rest: dict[str, Any]
    ) -> dict[str, Any]:
        rows = row_lists[0] + [row for row in row_lists[1] if row[0] != 1]
        return {**FEATURES[feature], **rest, "rows": rows or [[1, 1]], "H": heads[0], "K": heads[1]}

    rest = st.fixed_dictionaries(
        {
            "D": st.sampled_from((64, 128, 32, 80, 96)),
            "block": st.sampled_from(blocks),
            "lse": st.booleans(),
            "window": st.one_of(st.none(), st.integers(1, 70)),
            "tail": st.sampled_from(("nan", "loud")),
            "table_tail": st.sampled_from(("huge", "negative", "zero")),
            "q_pack": st.booleans(),
            "write": st.booleans(),
            "width": st.integers(0, 4),
            "dead": st.sampled_from(("keep", "zero")),
            "values": st.sampled_from(("normal", "sharp", "flat")),
        }
    )
    rows = st.tuples(st.lists(decode, max_size=5), st.lists(st.one_of(other, past), max_size=4))
    features = st.sampled_from(("plain", "softcap", "alibi", "sinks", "noncausal", "sinks_softcap"))
    return st.builds(build, rows, st.sampled_from(HEADS), features, rest)


def search(
    target: Target,
    *,
    count: int,
    seed: int,
    manifest_path: str | None = None,
    folder: Path | None = None,
    worker: Worker | None = None,
    on_try: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{tried, failure}: the smallest failing example that was found, or None.

    Saved failures in ``folder`` are tried before anything else. ``worker``: a process to do it in, which stays.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as start

    found: dict[str, Any] = {"backend": target.backend, "tried": 0, "failure": None}
    with nullcontext(worker) if worker is not None else Worker(target, timeout=30.0) as worker:
        facts = worker.open(target)
        manifest = find(facts, manifest_path, target.plugins)
        resolver = Resolver(facts, manifest)
        blocks = [size for size in (16, 8, 1, 32, 64) if manifest.declares(f"block:{size}")] or [resolver.block]

        def attempt(params: dict[str, Any]) -> None:
            text = json.dumps(params, sort_keys=True)
            name = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
            case = attention_case("fuzz", name, params)
            if manifest.undeclared(case.needs):
                return
            found["tried"] += 1
            on_try()
            result, _ = run_one(worker, case, manifest=manifest)
            if result.outcome.bad:
                reproduce = (
                    f"dougong compat repro --backend {target.backend} --seed {result.seed} --params '{text}' {case.id}"
                )
                found["failure"] = {
                    "id": case.id, "params": params, "seed": result.seed, "outcome": result.outcome.value,
                    "message": result.message[:500], "reproduce": reproduce,
                }  # fmt: skip
                raise AssertionError(result.message)

        for file in sorted(folder.glob("*.json")) if folder is not None and folder.is_dir() else []:
            try:
                attempt(json.loads(file.read_text(encoding="utf-8"))["params"])
            except AssertionError:
                return found
        searching = start(seed)(
            settings(
                max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False,
            )(given(examples(blocks))(attempt))
        )  # fmt: skip
        try:
            searching()
        except AssertionError:
            pass
    if found["failure"] is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        name = found["failure"]["id"].rpartition("/")[2]
        (folder / f"{name}.json").write_text(json.dumps(found["failure"], indent=1) + "\n", encoding="utf-8")
    return found
