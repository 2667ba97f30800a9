"""Running cases against a backend: answers to outcomes."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dougong_compat.case import Case
from dougong_compat.crew import answer_all
from dougong_compat.judge import kinds
from dougong_compat.manifest import Manifest
from dougong_compat.outcome import UNDECLARED, Judgement, Outcome, Result
from dougong_compat.pool import Answer, Clock, Worker
from dougong_compat.resolve import Resolver
from dougong_compat.tolerance import CLASSES

__all__ = ["Runner"]

#: Capabilities that no query shows to `supports`: a kernel can refuse them only when it meets them.
_LATE = ("cache:", "host_lengths_absent")


@dataclass
class Runner:
    """Judges a worker's answers under a manifest."""

    worker: Worker
    manifest: Manifest
    today: datetime.date
    guard: bool = False

    def __post_init__(self) -> None:
        torch.set_num_threads(1)  # the oracle's cases are tiny, and the worker wants the other cores
        self.resolver = Resolver(self.worker.facts, self.manifest, guard=self.guard)
        self.tolerance = CLASSES[self.manifest.tolerance]

    def run(
        self,
        cases: Sequence[Case],
        progress: Callable[[Result], None] | None = None,
        *,
        more: Sequence[Worker] = (),
        clock: Clock | None = None,
    ) -> list[Result]:
        """One result per case, in order; fewer where ``clock`` cuts the run. No case is run twice.

        ``more`` workers share the work. With a ``clock``, an interrupt of the user's cuts the run too.
        """
        known = [self._declared(case) for case in cases]
        requests = [
            # what is mandatory a backend's own kernels must do: the core's reference may not stand in for them
            self.resolver.request(case, declared=declared and not case.mandatory)
            for case, declared in zip(cases, known, strict=True)
        ]
        results: dict[int, Result] = {}
        lock = threading.Lock()
        last: dict[int, float] = {}

        def take(at: int, answer: Answer) -> None:
            result = self.judge(cases[at], known[at], requests[at], answer)
            now, lane = time.perf_counter(), threading.get_ident()
            # a case without an answer took the time since the last one
            result.seconds = float(answer.message.get("seconds", now - last.get(lane, started)))
            last[lane] = now
            with lock:
                results[at] = result
                if progress is not None:
                    progress(result)

        started = time.perf_counter()
        try:
            answer_all((self.worker, *more), requests, take, clock or Clock())
        except KeyboardInterrupt:
            if clock is None:
                raise
            clock.interrupted = True
        return [results[at] for at in sorted(results)]

    def _declared(self, case: Case) -> bool:
        return case.mandatory or not self.manifest.undeclared(case.needs)

    def judge(self, case: Case, declared: bool, request: dict[str, Any], answer: Answer) -> Result:
        """The outcome of one answer, by the honesty rules."""
        result = Result(case.id, case.level, Outcome.PASS, seed=request["seed"], entry=case.entry, link=case.link)
        missing = [] if declared else self.manifest.undeclared(case.needs)
        message = answer.message
        result.provider = str(message.get("provider", ""))
        if answer.fate != "answered":
            result.outcome = Outcome.CRASH if answer.fate == "crash" else Outcome.TIMEOUT
            result.message = answer.detail
        elif message.get("changed"):
            result.outcome = Outcome.FAIL
            what = "; ".join(map(str, message["changed"]))[:400]
            result.message = f"the plugin changed the suite in its worker: {what}"
        elif "skipped" in message:
            self._skipped(result, request, str(message["skipped"]))
        elif "refused" in message:
            self._refused(result, case, declared, str(message["refused"]))
        elif "error" in message:
            self._raised(result, case, declared, missing, message)
        else:
            self._computed(result, missing, request, answer)
        return self._waive(result)

    def _skipped(self, result: Result, request: dict[str, Any], reason: str) -> None:
        """Gigabytes may be lacking; nothing else is skipped."""
        if request.get("heavy"):
            result.outcome, result.message = Outcome.UNSUPPORTED, f"skipped by the suite: {reason}"
        else:
            result.outcome, result.message = Outcome.FAIL, f"skipped, and not by the suite: {reason}"

    def _refused(self, result: Result, case: Case, declared: bool, reason: str) -> None:
        if not declared:
            result.outcome, result.message = Outcome.UNSUPPORTED, reason
            return
        what = "mandatory" if case.mandatory else "declared"
        result.outcome, result.message = Outcome.FAIL, f"{what}, and refused: {reason}"

    def _raised(self, result: Result, case: Case, declared: bool, missing: list[str], message: dict[str, Any]) -> None:
        text = str(message["error"])
        if declared:
            result.outcome, result.message = Outcome.FAIL, f"declared, and raised {text}"
        elif any(need.startswith(_LATE) for need in missing) and message.get("error_type") in (
            "NotImplementedError", "ValueError", "RuntimeError", "KernelSelectionError", "AssertionError",
        ):  # fmt: skip
            result.outcome, result.message = Outcome.UNSUPPORTED, f"refused when run: {text}"
        else:
            result.outcome = Outcome.ERROR
            result.message = f"not declared ({', '.join(missing)}), not refused, and raised {text}"

    def _computed(self, result: Result, missing: list[str], request: dict[str, Any], answer: Answer) -> None:
        findings = [str(text) for text in answer.message.get("findings", ())]
        try:
            verdict = kinds.find(request["kind"])(request, answer.message, answer.tensors, self.tolerance)
        except Exception as error:  # an answer so wrong that it cannot be compared
            verdict = Judgement(False, f"the answer cannot be judged: {type(error).__name__}: {error}")
        result.margin = verdict.margin
        if findings or not verdict.ok:
            result.outcome = Outcome.FAIL
            result.message = "; ".join([*findings, verdict.message] if not verdict.ok else findings)
            if missing:
                result.message = f"not declared ({', '.join(missing)}), not refused, and wrong: {result.message}"
        elif missing:
            result.warnings.append(UNDECLARED + ", ".join(missing))
        if answer.message.get("warnings"):
            result.warnings += [str(text) for text in answer.message["warnings"]]

    def _waive(self, result: Result) -> Result:
        waiver = self.manifest.waiver(result.case_id, self.today)
        if waiver is None:
            return result
        if result.outcome is Outcome.PASS:
            result.outcome = Outcome.XPASS
            result.message = f"waived for {waiver.issue}, and passes: remove the waiver"
        elif result.outcome.bad:
            result.outcome = Outcome.WAIVED
            result.message = f"{waiver.issue}: {result.message}"
        return result
