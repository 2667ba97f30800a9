"""`Scheduler`: continuous batching under one token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

from dougong.errors import EngineError, InvalidRequestError
from dougong.kv import KVCacheManager
from dougong.scheduling.admission import check_request, most_tokens
from dougong.scheduling.config import SchedulerConfig
from dougong.scheduling.plan import StepPlan, TokenEvent
from dougong.scheduling.planner import Planner
from dougong.scheduling.policy import POLICIES, Policy
from dougong.scheduling.request import Request, RequestStatus
from dougong.scheduling.roster import Roster
from dougong.scheduling.stats import SchedulerStats
from dougong.types import FinishReason

__all__ = ["Scheduler"]


class Scheduler:
    """Decides what each step computes. Not thread-safe: one thread calls it.

    ``plan = schedule()``, compute the plan, ``events = commit(plan, sampled)``, again. `schedule` may run
    ahead of `commit` (overlap): it counts tokens that are sampled but not known yet, and a decode row then
    uses the token that is still on the device. Plans are committed in the order in which they were made.

    A request that ends, or is preempted, gives its blocks back at once, even while a plan in flight still
    computes for it. That is safe if the device runs plans in order: whoever gets the blocks next writes them
    in a later plan. What a plan in flight computes for an ended request is dropped at its commit; a token
    sampled for a request preempted meanwhile is kept.

    Nothing here depends on what is sampled except when a request ends, so greedy output is the same whatever
    the chunk size, the prefix cache, overlap or preemption.

    ``gate(request)`` is asked right before a request is admitted: it may fill the prefix cache for it, or answer
    False to have it passed over in this step.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        *,
        policy: Policy | None = None,
        gate: Callable[[Request], bool] | None = None,
    ) -> None:
        self.config = config
        self.kv = kv
        self._policy = POLICIES[config.policy] if policy is None else policy
        self._roster = Roster(kv, config.max_num_seqs)
        self._planner = Planner(self._roster, kv, config, gate)
        self._arrivals = 0
        self._scheduled_tokens = 0

    # -- requests ----------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request into the queue.

        Raises:
            InvalidRequestError: it can never be served, or its id is in use; nothing has changed.
        """
        if request.request_id in self._roster.requests:
            raise InvalidRequestError(
                f"request {request.request_id!r}: a request with this id is not finished yet; choose another id."
            )
        if request.status is not RequestStatus.WAITING or request.output_token_ids:
            raise InvalidRequestError(f"{request!r} was added before; make a new Request for each prompt.")
        check_request(request, self.config, self.kv)
        request.last_start = most_tokens(request, self.config, self.kv) - 2
        request.rank = self._policy(request, self._arrivals, self._planner.index, self.config)
        self._arrivals += 1
        self._roster.add(request)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> Request | None:
        """End a request from outside, in any state, for example at a stop string. None if there is none.

        Tokens that plans in flight sample for it are dropped.
        """
        request = self._roster.requests.get(request_id)
        if request is None:
            return None
        self._roster.end(request, reason, stop_reason)
        self._roster.leave([request])
        return request

    def abort(self, request_id: str) -> Request | None:
        """`finish` with ABORT. None if the request is unknown or has ended, which is no error."""
        return self.finish(request_id, FinishReason.ABORT)

    # -- steps -------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute now: commit what is in flight, or add work."""
        plan = self._planner.build()
        if plan is not None:
            self._roster.in_flight.append(plan)
            self._scheduled_tokens += plan.total_tokens
        return plan

    def commit(self, plan: StepPlan, sampled: Sequence[int | None]) -> list[TokenEvent]:
        """Take the tokens of the oldest plan in flight: ``sampled[i]`` for row i, ignored where it samples none.

        A None where a token is due means that the row failed: its request ends with ERROR. Returns one event
        per new token, in row order; a request's last event says why it ended.

        Raises:
            EngineError: ``plan`` is not the oldest in flight, or ``sampled`` is shorter than its rows.
        """
        in_flight = self._roster.in_flight
        if not in_flight or in_flight[0] is not plan:
            raise EngineError(
                f"commit of plan {plan.index}: the oldest in flight is "
                f"{in_flight[0].index if in_flight else 'none'}; commit plans once each, in the order of schedule()."
            )
        if len(sampled) < len(plan.requests):
            raise EngineError(
                f"commit of plan {plan.index}: {len(sampled)} sampled tokens for {len(plan.requests)} rows; give one "
                "entry per row, None where the row samples nothing."
            )
        in_flight.popleft()
        if plan.stale:
            return self._commit_each(plan, sampled, 0)
        rows = plan.requests
        num_decodes = plan.num_decode_rows
        decodes = rows if num_decodes == len(rows) else rows[:num_decodes]
        events: list[TokenEvent] = list(zip(decodes, sampled, repeat(None)))
        odd: list[tuple[Request, int, int | None]] = []
        for request, token, start in zip(decodes, sampled, plan.starts):
            if start >= request.commit_horizon or token in request.stop_ids:
                if start >= request.last_start or token in request.stop_ids:
                    odd.append((request, start + 1, token))
                    continue
                self._confirm(request, start + 1)
            request.output_token_ids.append(token)  # type: ignore[arg-type]  # None is in stop_ids
        if odd:
            ended: list[Request] = []
            for request, computed, token in odd:
                event = self._commit_row(request, computed, token)
                if event[2] is not None:
                    events[rows.index(request)] = event
                    ended.append(request)
            if ended:
                self._roster.leave(ended)
        if num_decodes < len(rows):
            events += self._commit_each(plan, sampled, num_decodes)
        return events

    def _commit_each(self, plan: StepPlan, sampled: Sequence[int | None], first: int) -> list[TokenEvent]:
        """Rows from ``first`` on, one by one, with an eye on those whose request has left the plan."""
        events: list[TokenEvent] = []
        ended: list[Request] = []
        for row in range(first, len(plan.requests)):
            request = plan.requests[row]
            computed = plan.starts[row] + plan.num_tokens[row]
            if request in plan.stale:
                if request.status is RequestStatus.FINISHED or not plan.samples[row]:
                    continue
                request.num_pending -= 1
                computed = 0
            elif not plan.samples[row]:
                self._confirm(request, computed)
                continue
            event = self._commit_row(request, computed, sampled[row])
            events.append(event)
            if event[2] is not None:
                ended.append(request)
        if ended:
            self._roster.leave(ended)
        return events

    def _commit_row(self, request: Request, computed: int, token: int | None) -> TokenEvent:
        """Confirm ``computed`` positions, append the token and judge whether the request ends with it."""
        self._confirm(request, computed)
        if token is None:
            self._roster.end(request, FinishReason.ERROR)
            return (request, None, FinishReason.ERROR)
        output = request.output_token_ids
        output.append(token)
        reason: FinishReason | None = None
        stop_reason: int | None = None
        if token in request.stop_ids and len(output) >= request.sampling.min_tokens:
            reason = FinishReason.STOP
            if token in request.sampling.stop_token_ids:
                stop_reason = token
        elif request.num_tokens >= request.last_start + 2:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._roster.end(request, reason, stop_reason)
        return (request, token, reason)

    def _confirm(self, request: Request, computed: int) -> None:
        if computed > request.confirm_at:
            for group, first, count in self.kv.confirm(request, computed):
                self._roster.updates.append((request.batch_index, group, first, [0] * count))
            at, last = request.confirm_at, request.last_start
            request.commit_horizon = at if at < last else last

    # -- what there is -----------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._roster.decoding) + len(self._roster.prefilling)

    @property
    def num_waiting(self) -> int:
        """New and preempted requests that have no seat."""
        return len(self._roster.waiting)

    @property
    def num_in_flight(self) -> int:
        """Plans made and not committed."""
        return len(self._roster.in_flight)

    @property
    def has_unfinished(self) -> bool:
        """Some request has not ended."""
        return bool(self._roster.requests)

    @property
    def has_work(self) -> bool:
        """Some request has not ended, or some plan is not committed."""
        return bool(self._roster.requests or self._roster.in_flight)

    def get(self, request_id: str) -> Request | None:
        """The unfinished request with this id."""
        return self._roster.requests.get(request_id)

    def running(self) -> list[Request]:
        """Requests that hold a seat, those decoding first, each part by rank."""
        return self._roster.decoding + self._roster.prefilling

    def waiting(self) -> list[Request]:
        """Requests without a seat, by rank."""
        return list(self._roster.waiting)

    def stats(self) -> SchedulerStats:
        """A snapshot. O(waiting)."""
        roster = self._roster
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_preempted_waiting=sum(r.status is RequestStatus.PREEMPTED for r in roster.waiting),
            num_plans_in_flight=len(roster.in_flight),
            total_steps=self._planner.index,
            total_scheduled_tokens=self._scheduled_tokens,
            total_preemptions=roster.num_preemptions,
            total_finished=dict(roster.finished),
            kv=self.kv.stats(),
        )

    def describe(self) -> dict[str, object]:
        """Limits and the KV cache's shape as plain values, for a report such as ``dougong doctor``."""
        config = self.config
        own = self._policy is POLICIES[config.policy]
        return {
            "policy": config.policy if own else getattr(self._policy, "__name__", repr(self._policy)),
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_model_len": config.max_model_len,
            "chunked_prefill": config.enable_chunked_prefill,
            "kv": self.kv.describe(),
        }

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if queues, seats, blocks and counts contradict each other. For tests and idle time."""
        self._roster.check_integrity()
