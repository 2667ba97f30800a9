"""The self-test: every mutant killed by the case named for it, honest backends green, cheats found out."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from dougong_compat.cases import collect_profile, find_case
from dougong_compat.manifest import find
from dougong_compat.outcome import Outcome
from dougong_compat.pool import OpenError, Target, Worker
from dougong_compat.run import Runner
from dougong_compat.selftest.backends import HONEST
from dougong_compat.selftest.mutants import all_mutants
from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["prove", "try_mutant"]

_TODAY = datetime.date(2026, 1, 1)


def _outcome(worker: Worker, target: Target, case_id: str) -> tuple[Outcome, str]:
    """What the case says of the target."""
    case = find_case(case_id)
    if case is None:
        raise ValueError(f"no case is called {case_id!r}")
    facts = worker.open(target)
    runner = Runner(worker, find(facts, None, target.plugins), _TODAY)
    result = next(iter(runner.run([case])))
    return result.outcome, result.message


def try_mutant(worker: Worker, mutant: Mutant) -> tuple[bool, str]:
    """(killed by its case, and only because of the bug; why)."""
    plugins = (HONEST[mutant.backend],)
    honest, why = _outcome(worker, Target(mutant.backend, plugins), mutant.killed_by)
    if honest is not Outcome.PASS:
        return False, f"its case does not pass without the bug: {honest.value} {why}"
    planted, why = _outcome(worker, Target(mutant.backend, plugins, mutant.name), mutant.killed_by)
    return planted.bad, f"{planted.value}: {why}"


def prove(
    only: Sequence[str] = (),
    *,
    honest: bool = True,
    say: Callable[[str], None] | None = None,
    timeout: float = 8.0,
    on_mutant: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """{killed, equivalent, survivors, wrong}: ``wrong`` lists honest backends that fail and cheats that do not.

    ``on_mutant`` hears (mutants tried, mutants in all).
    """
    tell = say or (lambda text: None)
    outcome: dict[str, Any] = {"killed": [], "equivalent": [], "survivors": [], "wrong": []}
    chosen = [mutant for mutant in all_mutants() if not only or any(text in mutant.name for text in only)]
    with Worker(Target("honest-eager", (HONEST["honest-eager"],)), timeout=timeout) as worker:
        worker.start()
        for done, mutant in enumerate(chosen):
            on_mutant(done, len(chosen))
            if mutant.equivalent:
                outcome["equivalent"].append({"name": mutant.name, "argument": mutant.equivalent})
                continue
            try:
                killed, why = try_mutant(worker, mutant)
            except (OpenError, ValueError) as error:
                killed, why = False, f"{type(error).__name__}: {error}"
            row = {"name": mutant.name, "entry": mutant.entry, "case": mutant.killed_by, "why": why[:300]}
            outcome["killed" if killed else "survivors"].append(row)
            if not killed:
                tell(f"SURVIVES {mutant.name}: {why[:300]}")
    if honest:
        outcome["wrong"] = _honest(tell) + _cheats(tell) + _oracle(tell)
    return outcome


def _honest(tell: Callable[[str], None]) -> list[str]:
    """Honest backends over the smoke profile: green."""
    wrong = []
    for name, plugin in HONEST.items():
        target = Target(name, (plugin,))
        with Worker(target) as worker:
            facts = worker.start()
            results = list(Runner(worker, find(facts, None, target.plugins), _TODAY).run(collect_profile("smoke")))
        bad = [result for result in results if result.outcome.bad]
        tell(f"{name}: {len(results)} cases, {len(bad)} bad")
        wrong += [f"{name}: {result.case_id}: {result.message[:160]}" for result in bad[:3]]
    return wrong


def _cheats(tell: Callable[[str], None]) -> list[str]:
    from dougong_compat.selftest.cheats import CHEATS, verdict_on

    wrong = []
    for name in CHEATS:
        word, why = verdict_on(name)
        tell(f"{name}: {word} ({why[:120]})")
        if word not in ("NOT", "INVALID"):
            wrong.append(f"{name} comes out {word}")
    return wrong


def _oracle(tell: Callable[[str], None]) -> list[str]:
    from dougong_compat.selftest.oracle_bugs import survivors

    left = survivors()
    tell(f"oracle: {len(left)} planted bugs survive the second oracle")
    return [f"oracle bug {name} is not seen" for name in left]
