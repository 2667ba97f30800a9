"""Who waits, who runs, in which seat: the scheduler's state, and the moves between its queues."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter

from dougong.kv import IntegrityError, KVCacheManager
from dougong.scheduling.plan import BlockUpdate, StepPlan
from dougong.scheduling.request import Request, RequestStatus
from dougong.types import FinishReason

__all__ = ["Roster"]

_BY_RANK = attrgetter("rank")


class Roster:
    """Queues sorted by rank (best first), seats of the persistent batch, and what the next plan must report.

    A running request sits in exactly one of ``prefilling`` (known tokens are still to be computed) and
    ``decoding`` (one new token per step). Lists, not heaps: they are iterated every step in order and
    changed rarely.
    """

    __slots__ = (
        "changed",
        "decoding",
        "finished",
        "free_seats",
        "in_flight",
        "kv",
        "num_preemptions",
        "prefilling",
        "released",
        "requests",
        "updates",
        "waiting",
    )

    def __init__(self, kv: KVCacheManager, num_seats: int) -> None:
        self.kv = kv
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self.free_seats = list(range(num_seats - 1, -1, -1))
        self.in_flight: deque[StepPlan] = deque()
        self.released: list[int] = []
        self.updates: list[BlockUpdate] = []
        self.changed = True  # decoding differs from the rows of the last plan
        self.num_preemptions = 0
        self.finished: dict[str, int] = {reason.value: 0 for reason in FinishReason}

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=_BY_RANK)
        if request.parent is not None:
            request.parent.children.append(request)

    def seat(self, request: Request) -> None:
        """Give a request, whose blocks are there, a row of the batch and report its whole block table."""
        request.batch_index = seat = self.free_seats.pop()
        request.status = RequestStatus.RUNNING
        for group, table in enumerate(request.block_ids):
            self.updates.append((seat, group, 0, table[:]))

    def start_decoding(self, request: Request, plan_index: int) -> None:
        """All known tokens are scheduled: from now on it takes one new token per step."""
        request.prefilled_at = plan_index
        request.schedule_horizon = 0 if request.requires_commit else min(request.capacity, request.last_start + 1)
        request.commit_horizon = min(request.confirm_at, request.last_start)
        insort(self.decoding, request, key=_BY_RANK)
        self.changed = True

    def worst(self) -> Request | None:
        """The running request of the worst rank."""
        if self.prefilling and (not self.decoding or self.prefilling[-1].rank > self.decoding[-1].rank):
            return self.prefilling[-1]
        return self.decoding[-1] if self.decoding else None

    def preempt_worst(self, num_pending: int) -> None:
        """Take the blocks and the seat of `worst`; it waits, by its old rank, to be computed again.

        ``num_pending`` of its sampled tokens are in flight; they are kept when they arrive.
        """
        request = self.worst()
        assert request is not None
        (self.decoding if self.decoding and self.decoding[-1] is request else self.prefilling).pop()
        self._vacate(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed = 0
        request.num_pending = num_pending
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=_BY_RANK)

    def end(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Finish a request in any state and give back all that it holds, but leave the queues to `leave`."""
        if request.status is RequestStatus.RUNNING:
            self._vacate(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self.finished[reason.value] += 1
        del self.requests[request.request_id]

    def leave(self, ended: list[Request]) -> None:
        """Take ended requests out of whichever queue they are in."""
        for name in ("decoding", "prefilling", "waiting"):
            queue: list[Request] = getattr(self, name)
            if len(ended) == 1 or name == "waiting":
                for request in ended:
                    at = bisect_left(queue, request.rank, key=_BY_RANK)
                    if at < len(queue) and queue[at] is request:
                        del queue[at]
            else:
                setattr(self, name, [r for r in queue if r.status is not RequestStatus.FINISHED])

    def _vacate(self, request: Request) -> None:
        """Blocks and seat go back; plans in flight learn that the row is no longer this request's."""
        seat = request.batch_index
        self.kv.release(request)
        request.batch_index = -1
        request.prefilled_at = -1
        self.free_seats.append(seat)
        self.released.append(seat)
        if self.updates:
            self.updates = [update for update in self.updates if update[0] != seat]
        for plan in self.in_flight:
            plan.stale.add(request)
        self.changed = True

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if queues, seats, blocks and states contradict each other."""
        self.kv.check_integrity(self.requests.values())
        running = self.prefilling + self.decoding
        for queue in (self.waiting, self.prefilling, self.decoding):
            if [r.rank for r in queue] != sorted(r.rank for r in queue):
                raise IntegrityError(f"a queue is out of order: {queue}")
        if {id(r) for r in running + self.waiting} != {id(r) for r in self.requests.values()}:
            raise IntegrityError("the queues do not hold exactly the unfinished requests")
        if len(running) + len(self.waiting) != len(self.requests):
            raise IntegrityError("a request is in two queues")
        seats = sorted([r.batch_index for r in running] + self.free_seats)
        if seats != list(range(len(seats))):
            raise IntegrityError(f"seats are lost or taken twice: {seats}")
        for request in self.waiting:
            if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED) or request.block_ids:
                raise IntegrityError(f"{request!r} waits with blocks {request.block_ids} or in the wrong state")
        for request in running:
            if request.status is not RequestStatus.RUNNING or request.capacity < request.num_computed:
                raise IntegrityError(f"{request!r} runs in the wrong state or beyond its {request.capacity} positions")
