"""Searching for a failing batch with Hypothesis: shrunk, saved, and tried first the next time."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dougong_compat.case import Case, seed_of
from dougong_compat.cases.attention import HEADS
from dougong_compat.cases.make import FEATURES, attention_case
from dougong_compat.manifest import Manifest, find
from dougong_compat.outcome import Outcome, Result
from dougong_compat.pool import Clock, OpenError, Target, Worker
from dougong_compat.resolve import Resolver
from dougong_compat.run import Runner

__all__ = ["Found", "examples", "of_a_profile", "run_one", "search"]

#: Examples that a run of the profiles ``full`` and ``certified`` tries; the same ones every time.
EXAMPLES = 100


@dataclass
class Found:
    """What the search of a profile came to: a line for the report, a result for what failed, why it cannot count."""

    report: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def of_a_profile(runner: Runner, clock: Clock, options: str = "") -> Found:
    """Search for ``EXAMPLES`` with the runner's own worker and manifest; ``clock`` and the user may cut it."""
    seed = seed_of("L1/fuzz") % 2**32
    worker = runner.worker
    try:
        outcome = search(
            worker.target, count=EXAMPLES, seed=seed, worker=worker, manifest=runner.manifest, guard=runner.guard,
            clock=clock, options=options,
        )  # fmt: skip
    except OpenError as error:
        return Found(problems=[f"the search for failing batches came to no end: {error}"])
    except KeyboardInterrupt:
        clock.interrupted = True
        return Found(problems=["the run was interrupted in the search for failing batches"])
    failure = outcome["failure"]
    if clock.over and failure is None:
        return Found(problems=[f"time was up after {outcome['tried']} examples of the search for failing batches"])
    found = Found({"examples": outcome["tried"], "seed": seed, "failed": failure is not None})
    if failure is not None:
        result = Result(failure["id"], "L1", Outcome(failure["outcome"]), failure["message"], seed=failure["seed"])
        result.reproduce = failure["reproduce"]
        found.results.append(result)
    return found


def run_one(
    worker: Worker, case: Case, manifest_path: str | None = None, manifest: Manifest | None = None, *,
    guard: bool = False,
) -> tuple[Result, dict[str, Any]]:  # fmt: skip
    """Run one case; (result, the worker's whole message)."""
    if worker.socket is None:
        worker.start()
    declared = manifest or find(worker.facts, manifest_path, worker.target.plugins)
    runner = Runner(worker, declared, datetime.datetime.now(datetime.timezone.utc).date(), guard)
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
    manifest: Manifest | None = None,
    guard: bool = False,
    clock: Clock | None = None,
    options: str = "",
    on_try: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{tried, failure}: the smallest failing example that was found, or None.

    Saved failures in ``folder`` are tried before anything else. ``worker``: a process to do it in, which stays.
    ``manifest``: one at hand, in place of the file's. ``clock``: when to try no more. ``options``: what the line that
    runs a failure again needs besides (``Session.options``).
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as start

    found: dict[str, Any] = {"backend": target.backend, "tried": 0, "failure": None}
    with nullcontext(worker) if worker is not None else Worker(target, timeout=30.0) as worker:
        facts = worker.open(target)
        declared = manifest or find(facts, manifest_path, target.plugins)
        resolver = Resolver(facts, declared)
        blocks = [size for size in (16, 8, 1, 32, 64) if declared.declares(f"block:{size}")] or [resolver.block]

        def attempt(params: dict[str, Any]) -> None:
            text = json.dumps(params, sort_keys=True)
            name = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
            case = attention_case("fuzz", name, params)
            if declared.undeclared(case.needs) or (clock is not None and clock.over):
                return
            found["tried"] += 1
            on_try()
            result, _ = run_one(worker, case, manifest=declared, guard=guard)
            if result.outcome.bad:
                reproduce = (
                    f"dougong compat repro --backend {target.backend}{options} --seed {result.seed} --params '{text}' "
                    f"{case.id}"
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

        @start(seed)
        @settings(
            max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False,
        )  # fmt: skip
        @given(examples(blocks))
        def searching(params: dict[str, Any]) -> None:
            attempt(params)

        try:
            searching()
        except AssertionError:
            pass
    if found["failure"] is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        name = found["failure"]["id"].rpartition("/")[2]
        (folder / f"{name}.json").write_text(json.dumps(found["failure"], indent=1) + "\n", encoding="utf-8")
    return found
