"""The engine: schedule, run, commit, publish. Synchronous; one thread calls it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

from dougong.config import EngineConfig
from dougong.engine.completion import Completion, RequestGroup
from dougong.engine.grammars import GrammarCompiler
from dougong.engine.kv_transfer import open_transfer
from dougong.engine.logprobs import LogprobReader
from dougong.engine.policies import find_policy
from dougong.engine.prompt import Prompt, PromptReader
from dougong.engine.stats import EngineStats
from dougong.errors import DeviceLostError, EngineError, InvalidRequestError
from dougong.execution import ModelRunner, PendingStep, StepResult, TokenLogprobs
from dougong.execution.runner import first_line
from dougong.kv import KVCacheManager
from dougong.models import get_tokenizer
from dougong.plugins import Plugins, StepRecord, load_plugins
from dougong.scheduling import POLICIES, Request, Scheduler, SchedulerConfig, StepPlan, TokenEvent
from dougong.types import FinishReason, RequestOutput, RequestTimes, SamplingParams

__all__ = ["Engine"]

log = logging.getLogger(__name__)

_POLL_S = 0.001
"""Pause of a step that has nothing to do but wait for another engine's KV."""


class _Flight:
    """A step on its way: its plan, and the result to come or the error that launching raised."""

    __slots__ = ("error", "launch_s", "pending", "plan", "schedule_s", "started")

    def __init__(self, plan: StepPlan, started: float, schedule_s: float) -> None:
        self.plan = plan
        self.started = started
        self.schedule_s = schedule_s
        self.pending: PendingStep | None = None
        self.error: Exception | None = None
        self.launch_s = 0.0


class Engine:
    """One model on one backend. Add requests, call `step` while `has_work`.

    The outputs that `step` returns grow in place: a request's RequestOutput is the same object in every step.

    Args:
        config: the options.
        plugins: those loaded already; None loads the installed ones.

    Raises:
        DougongError: whatever stops the start: plugin, backend, model, memory; each says what to do.
    """

    def __init__(self, config: EngineConfig, *, plugins: Plugins | None = None, runner: ModelRunner | None = None):
        self.config = config
        self.plugins = plugins if plugins is not None else load_plugins()
        policy = find_policy(config.scheduling_policy, self.plugins)
        self.runner = runner if runner is not None else ModelRunner(config, plugins=self.plugins)
        if config.warm_up:
            self.runner.warm_up()
        self.max_model_len = self.runner.max_model_len
        self.kv = KVCacheManager(
            self.runner.group_specs,
            enable_prefix_caching=config.enable_prefix_caching,
            model_id=str(self.runner.model_path),
        )
        self.transfer = open_transfer(config, self.runner, self.kv, self.plugins)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=self.runner.max_num_seqs,
                max_num_batched_tokens=self.runner.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                enable_chunked_prefill=config.enable_chunked_prefill,
                policy=config.scheduling_policy if config.scheduling_policy in POLICIES else "fcfs",
                long_prefill_threshold=config.long_prefill_token_threshold,
            ),
            self.kv,
            policy=policy,
            gate=None if self.transfer is None else self.transfer.admit,
        )
        self.tokenizer = None if config.skip_tokenizer_init else self._load_tokenizer()
        self.prompts = PromptReader(self.tokenizer, self.runner.model_config.vocab_size, self.max_model_len)
        self.eos_token_ids = frozenset(self.runner.model_config.eos_token_ids)
        self.stats = EngineStats()
        self.observers = [observer for _, observer in self.plugins.records("dougong_observers")]
        """Told of each step, on this thread."""
        self.grammars = GrammarCompiler(
            lambda: self.tokenizer or self._load_tokenizer(), self.runner.model_config.vocab_size, self.eos_token_ids
        )
        self._logprobs = LogprobReader(self.tokenizer)
        self._groups: dict[str, RequestGroup] = {}
        self._completions: dict[Request, Completion] = {}
        self._flights: deque[_Flight] = deque()
        self._depth = 1 if config.overlap else 0
        self._touched: dict[RequestGroup, None] = {}  # in the order in which they changed
        self._arrivals = 0
        self._closed = False
        self._lost: DeviceLostError | None = None

    def _load_tokenizer(self) -> Any:
        config = self.config
        return get_tokenizer(
            config.tokenizer or self.runner.model_path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            vocab_size=self.runner.model_config.vocab_size,
        )

    @property
    def model_path(self) -> Path:
        """The folder the weights were loaded from, readable by transformers."""
        return self.runner.model_path

    # -- requests ----------------------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        arrival: float | None = None,
    ) -> RequestOutput:
        """Take a request; its completions start with the next step that has room.

        Returns the output that will grow.

        Raises:
            InvalidRequestError: it can never be served; nothing was taken, and the others are unharmed.
            EngineError: the engine is closed, or its device is lost.
        """
        if self._closed:
            raise EngineError("the engine is closed; make a new one.")
        if self._lost is not None:
            raise self._lost
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use: give each running request its own.")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(f"priority={priority!r}: allowed is an integer; lower goes first.")
        read = self.prompts.read(prompt)
        sampling = self.prompts.resolve(SamplingParams() if sampling is None else sampling)
        if self.runner.model_config.headless and sampling.pooling is None:
            raise InvalidRequestError(
                f"the checkpoint in {self.model_path} has no head: it cannot write text. Ask for vectors: LLM.embed, "
                "or /v1/embeddings."
            )
        grammar = None if sampling.structured is None else self.grammars.compile(sampling.structured)
        group = RequestGroup(request_id, read.text, read.token_ids, sampling)
        self._arrivals += 1
        first: Request | None = None
        try:
            for index in range(sampling.n):
                own = self._sampling_of(sampling, index)
                name = request_id if sampling.n == 1 else f"{request_id}-{index}"
                if first is None:
                    request = first = Request(
                        name, read.token_ids, own, eos_token_ids=self.eos_token_ids, priority=priority,
                        arrival=self._arrivals if arrival is None else arrival, cache_salt=read.cache_salt,
                        grammar=grammar,
                    )  # fmt: skip
                else:
                    request = first.sibling(name, own)
                self.scheduler.add(request)
                self._completions[request] = group.add(request, self.tokenizer)
        except InvalidRequestError:
            for completion in group.completions:
                self.scheduler.abort(completion.request.request_id)
                del self._completions[completion.request]
            raise
        self._groups[request_id] = group
        if self.transfer is not None:
            for completion in group.completions:
                self.transfer.expect(completion.request, read.kv_transfer_params)
        return group.output

    @staticmethod
    def _sampling_of(sampling: SamplingParams, index: int) -> SamplingParams:
        """One completion's options. The prompt's log-probabilities are the first one's to give, for all."""
        if sampling.n == 1:
            return sampling
        return replace(sampling, n=1, prompt_logprobs=None if index else sampling.prompt_logprobs)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in whatever state it is and return its output; None if it is not known (or over).

        Its blocks are free at once. No later `step` returns it again.
        """
        group = self._groups.get(request_id)
        if group is None:
            return None
        for completion in group.completions:
            if not completion.output.finished:
                self._close(completion, FinishReason.ABORT)
        self._touched.pop(group, None)
        return group.output

    def stop(self, request_id: str, index: int, stop: str) -> None:
        """End one completion at stop string ``stop``, which whoever makes the text elsewhere found. Over: no effect.

        No later `step` returns the request on this account.
        """
        group = self._groups.get(request_id)
        if group is None or group.completions[index].output.finished:
            return
        seen = group in self._touched
        self._close(group.completions[index], FinishReason.STOP, stop)
        if not seen:
            self._touched.pop(group, None)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._flights) or self.scheduler.has_work or (self.transfer is not None and self.transfer.has_work)

    # -- the step ----------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that changed.

        With overlap on, a step is launched before the one before it is taken back.

        Raises:
            DeviceLostError: the device answers no more; every request has ended with this cause.
        """
        if self._lost is not None:
            raise self._lost
        started = perf_counter()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._flights.append(self._launch(plan, started))
        elif self.transfer is not None and self.transfer.num_waiting:
            if not self._flights:
                sleep(_POLL_S)
        elif not self._flights and self.scheduler.has_work:
            raise EngineError(
                f"{self.scheduler.num_waiting} requests wait, {self.scheduler.num_running} run, and none can be "
                "scheduled although no step is under way: the scheduler is stuck. Please report this."
            )
        # A step that could not be launched left no tokens for the next one to go on from: it ends at once.
        failed = plan is not None and self._flights[-1].error is not None
        depth = 0 if failed or plan is None else self._depth
        while len(self._flights) > depth:
            self._land(self._flights.popleft())
            if not failed:
                break
        if self.transfer is not None and not self._flights:
            self.transfer.flush()
        touched = [group.output for group in self._touched]
        self._touched.clear()
        return touched

    def _launch(self, plan: StepPlan, started: float) -> _Flight:
        scheduled = perf_counter()
        flight = _Flight(plan, started, scheduled - started)
        try:
            flight.pending = self.runner.execute(plan)
        except Exception as error:
            log.exception("a step of %d rows could not be launched", plan.num_rows)
            flight.error = error
        if plan.admitted:
            self._note_start(plan.admitted)
        flight.launch_s = perf_counter() - scheduled
        return flight

    def _note_start(self, admitted: list[Request]) -> None:
        now = monotonic()
        for request in admitted:
            completion = self._completions.get(request)
            if completion is None:
                continue
            output = completion.group.output
            output.num_cached_tokens = max(output.num_cached_tokens, request.num_cached_tokens)
            if output.times.first_scheduled is None:
                output.times.first_scheduled = now

    def _land(self, flight: _Flight) -> None:
        begun = perf_counter()
        result = self._result(flight)
        waited = perf_counter()
        plan = flight.plan
        for row, error in result.errors.items():
            self._fail(plan.requests[row], error)
        if result.prompt_logprobs:
            for row, entries in result.prompt_logprobs.items():
                self._add_prompt_logprobs(plan.requests[row], entries)
        for row, (anew, vector) in result.vectors.items():
            completion = self._completions.get(plan.requests[row])
            if completion is not None:
                completion.group.add_vector(anew, vector)
        if self.transfer is not None:
            self.transfer.flush()  # what began behind the step before: its copies have run by now
            self.transfer.computed(plan)
        self._publish(plan, result, self.scheduler.commit(plan, result.tokens))
        for row in result.complete:
            completion = self._completions.get(plan.requests[row])
            if completion is not None:
                self._close(completion, FinishReason.STOP)
        self._observe(flight, waited - begun, perf_counter() - waited)

    def _result(self, flight: _Flight) -> StepResult:
        """The step's result. If it failed, all that took part in it or counted on it have ended with the cause."""
        error = flight.error
        if error is None:
            assert flight.pending is not None
            try:
                return flight.pending.result()
            except Exception as raised:
                log.exception("a step of %d rows failed", flight.plan.num_rows)
                error = raised
        fault = self.runner.device_fault()
        if fault:
            raise self._lose(error, fault) from error
        cause = EngineError(f"the step failed: {type(error).__name__}: {error}")
        # Block-table changes of any running request may be lost, and siblings may read blocks never written.
        for request in {*flight.plan.requests, *self.scheduler.running()}:
            completion = self._completions.get(request)
            for one in completion.group.completions if completion is not None else ():
                self._fail(one.request, cause)
        return StepResult([None] * flight.plan.num_rows)

    def _lose(self, error: Exception, fault: str) -> DeviceLostError:
        """The device is gone: end every request, forget what is under way. Nothing here asks it for anything."""
        found = f"{type(error).__name__}: {first_line(error)}"
        self._lost = DeviceLostError(
            f"the device is lost: a step failed ({found}) and {self.runner.backend.device.name} answers no more"
            f"{'' if fault == found else f' ({fault})'}. Requests that ran or waited have ended with this cause. Start "
            "the process again (a server does so by itself); if it comes back, look at the driver's log."
        )
        log.error("%s", self._lost)
        text = f"{type(self._lost).__name__}: {self._lost}"
        for group in self._groups.values():
            for completion in group.completions:
                if not completion.output.finished:
                    completion.finish(FinishReason.ERROR, None, text)
                    group.finished_one()
        self._groups.clear()
        self._completions.clear()
        self._touched.clear()
        self._flights.clear()
        return self._lost

    def _publish(self, plan: StepPlan, result: StepResult, events: list[TokenEvent]) -> None:
        """Hand the new tokens out. This loop is what a step costs per token: keep it bare."""
        completions, touched, logprobs = self._completions, self._touched, result.logprobs
        rows = {request: row for row, request in enumerate(plan.requests)} if logprobs else {}
        now = monotonic()
        count = 0
        for request, token_id, finish in events:
            completion = completions.get(request)
            if completion is None or token_id is None:
                if completion is not None and finish is not None:
                    self._finished(completion, finish, request.stop_reason)
                continue
            count += 1
            if completion.bare and finish is None:
                completion.append(token_id)
                group = completion.group
                group.times.last_token = now
                touched[group] = None
            else:
                self._advance(completion, token_id, finish, logprobs.get(rows[request]) if logprobs else None, now)
        self.stats.generated_tokens += count

    def _advance(
        self,
        completion: Completion,
        token_id: int,
        finish: FinishReason | None,
        logprobs: TokenLogprobs | None,
        now: float,
    ) -> None:
        """Take a token with all that may hang on it: text, stop strings, log-probabilities, the end."""
        times = completion.group.times
        if times.first_token is None:
            times.first_token = now
        times.last_token = now
        stop = completion.push(token_id, finish)
        if logprobs is not None:
            completion.add_logprobs(token_id, self._logprobs.entry(token_id, logprobs))
        if stop is not None:
            self._close(completion, FinishReason.STOP, stop)
        elif finish is not None:
            self._finished(completion, finish, completion.request.stop_reason)
        else:
            self._touched[completion.group] = None

    def _add_prompt_logprobs(self, request: Request, entries: Sequence[Any]) -> None:
        completion = self._completions.get(request)
        if completion is None or completion.output.index:
            return
        shown = completion.group.output.prompt_logprobs
        assert shown is not None
        for token_id, entry in entries:
            shown.append(self._logprobs.entry(token_id, entry))

    # -- the end of a completion -------------------------------------------------------------------------

    def _fail(self, request: Request, error: Exception) -> None:
        completion = self._completions.get(request)
        if completion is not None:
            self._close(completion, FinishReason.ERROR, error=f"{type(error).__name__}: {error}")

    def _close(
        self, completion: Completion, reason: FinishReason, stop: str | None = None, *, error: str | None = None
    ) -> None:
        """End it from outside the scheduler."""
        self.scheduler.finish(completion.request.request_id, reason, stop)
        self._finished(completion, reason, stop, error)

    def _finished(
        self, completion: Completion, reason: FinishReason, stop: int | str | None, error: str | None = None
    ) -> None:
        completion.finish(reason, stop, error)
        group = completion.group
        if completion.sampling.pooling is not None:
            group.finish_vector(completion)
        output = group.output
        output.num_cached_tokens = max(output.num_cached_tokens, completion.request.num_cached_tokens)
        del self._completions[completion.request]
        if self.transfer is not None:
            output.kv_transfer_params = self.transfer.finished(completion.request) or output.kv_transfer_params
        group.finished_one()
        if output.finished:
            del self._groups[output.request_id]
            self.stats.count(output)
        self._touched[group] = None

    # -- looking in --------------------------------------------------------------------------------------

    def _observe(self, flight: _Flight, wait_s: float, commit_s: float) -> None:
        stats, plan = self.stats, flight.plan
        stats.steps += 1
        stats.schedule_s += flight.schedule_s
        stats.launch_s += flight.launch_s
        stats.wait_s += wait_s
        stats.commit_s += commit_s
        stats.computed_tokens += plan.total_tokens
        stats.preemptions += plan.num_preempted
        if not self.observers:
            return
        record = StepRecord(
            index=plan.index, num_rows=plan.num_rows, num_decode_rows=plan.num_decode_rows,
            num_tokens=plan.total_tokens, running=self.scheduler.num_running, waiting=self.scheduler.num_waiting,
            preemptions=plan.num_preempted, kv_usage=self.kv.usage, started=flight.started,
            schedule_s=flight.schedule_s, launch_s=flight.launch_s, wait_s=wait_s, commit_s=commit_s,
        )  # fmt: skip
        for observer in list(self.observers):
            try:
                observer.on_step(record)
            except Exception:
                log.exception("observer %r failed and is dropped", observer)
                self.observers.remove(observer)

    def times_of(self, request: Request) -> RequestTimes | None:
        """When the user's request behind ``request`` arrived and gave its first token; None once it is over."""
        completion = self._completions.get(request)
        return None if completion is None else completion.group.times

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no request holds, and what was given to other engines or came from them."""
        self.kv.reset_prefix_cache()
        if self.transfer is not None:
            self.transfer.reset()

    def close(self) -> None:
        """Abort what runs and free the device. May be called again."""
        if self._closed:
            return
        self._closed = True
        for request_id in list(self._groups):
            self.abort(request_id)
        try:
            while self._flights:
                self._land(self._flights.popleft())
            if self.transfer is not None:
                self.transfer.close()
        except RuntimeError:  # a copy from a device that is lost
            if self._lost is None:
                raise
        except DeviceLostError:  # it says so itself
            pass
        self.grammars.close()
        self.runner.close()
