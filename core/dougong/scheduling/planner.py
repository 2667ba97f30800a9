"""How one step is put together: decodes first, then prefills under way, then new admissions."""

from __future__ import annotations

from collections.abc import Callable

from dougong.kv import BlockCopy, KVCacheManager, PrefixHit
from dougong.kv.prefix import NO_HIT
from dougong.scheduling.config import SchedulerConfig
from dougong.scheduling.plan import StepPlan
from dougong.scheduling.request import Request, RequestStatus
from dougong.scheduling.roster import Roster

__all__ = ["Planner"]


class Planner:
    """Builds plans from a `Roster`. Within one plan, only requests of a worse rank are preempted for blocks.

    So the best-ranked running request always advances, and with it, in the end, every other. The worst-ranked
    one that finds no block stalls, holding what it has, until blocks are freed or a better one takes them.
    While anyone stalls, or right after a preemption, nobody is admitted.
    """

    __slots__ = (
        "_admitted",
        "_blocked",
        "_chunk_cap",
        "_config",
        "_copies",
        "_counts",
        "_gate",
        "_kv",
        "_roster",
        "_rows",
        "_samples",
        "_skipped",
        "_stalled",
        "_starts",
        "_watermarks",
        "index",
        "num_preempted",
    )

    def __init__(
        self,
        roster: Roster,
        kv: KVCacheManager,
        config: SchedulerConfig,
        gate: Callable[[Request], bool] | None = None,
    ) -> None:
        self._roster = roster
        self._kv = kv
        self._config = config
        self._gate = gate
        self._chunk_cap = config.long_prefill_threshold or config.max_num_batched_tokens
        self._watermarks = [int(config.watermark * g.pool.num_usable) for g in kv.groups]
        self._blocked: tuple[Request, int] | None = None
        self.index = 0
        self._reset()

    def _reset(self) -> None:
        self._rows: list[Request] = []
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._samples: list[bool] = []
        self._skipped: list[Request] = []
        self._admitted: list[Request] = []
        self._copies: list[BlockCopy] = []
        self._stalled = False
        self.num_preempted = 0

    def build(self) -> StepPlan | None:
        """The next plan, or None if no token can be computed now."""
        roster = self._roster
        self._reset()
        self._add_decodes()
        num_decodes = len(self._rows)
        if roster.prefilling or roster.waiting:
            num_decodes = self._add_prefills(num_decodes)
            if roster.waiting and not self._stalled and not self.num_preempted:
                self._add_admissions(num_decodes)
            self._kv.flush_copies()
        rows = self._rows
        if not rows:
            return None
        mixed = len(rows) > num_decodes
        plan = StepPlan(
            self.index,
            rows,
            self._starts,
            [1] * num_decodes + self._counts,
            [True] * num_decodes + self._samples,
            num_decodes,
            num_decodes + sum(self._counts),
            mixed or roster.changed,
            self._admitted,
            roster.released,
            roster.updates,
            self._copies,
            self.num_preempted,
        )
        roster.changed = mixed or bool(self._skipped)
        roster.released = []
        roster.updates = []
        self.index += 1
        return plan

    # -- decodes -----------------------------------------------------------------------------------------

    def _add_decodes(self) -> None:
        """One token for each decoding request. This loop is what a step costs per request: keep it bare."""
        decoding = self._roster.decoding
        starts = self._starts
        push = starts.append
        for request in decoding:  # preemption may shorten the list at its end, behind the present request
            start = request.num_computed
            if start >= request.schedule_horizon and not self._can_decode(request, start):
                self._skipped.append(request)
                continue
            push(start)
            request.num_computed = start + 1
        if self._skipped:
            skipped = set(self._skipped)
            self._rows = [request for request in decoding if request not in skipped]
            self._roster.changed = True
        else:
            self._rows = decoding[:]

    def _can_decode(self, request: Request, start: int) -> bool:
        """At the horizon: is there a reason not to compute position ``start``, or a block to allocate?"""
        if start > request.last_start:
            return False  # its last token is in flight
        if request.requires_commit:
            if start >= request.num_tokens:
                return False  # its newest token is in flight
        elif start < request.capacity:
            request.schedule_horizon = min(request.capacity, request.last_start + 1)
        if start < request.capacity:
            return True
        while (grown := self._kv.grow(request, start + 1)) is None:
            if not self._preempt_for(request):
                self._stalled = True
                request.schedule_horizon = 0
                return False
        seat, report = request.batch_index, self._roster.updates.append
        for group, first, ids in grown:
            report((seat, group, first, ids))
        if not request.requires_commit:
            capacity, last = request.capacity, request.last_start
            request.schedule_horizon = capacity if capacity <= last else last + 1
        return True

    def _preempt_for(self, request: Request) -> bool:
        """Free the blocks of the worst-ranked running request, unless that is ``request`` itself."""
        roster = self._roster
        victim = roster.worst()
        if victim is None or victim is request:
            return False
        pending = 0
        if victim.prefilled_at >= 0:
            pending = victim.num_computed + 1 - victim.num_tokens
            if self._rows and self._rows[-1] is victim:
                # It was planned in this very step: take the row back. Decode rows are in rank order and no
                # prefill row of a worse rank than ``request`` exists yet, so it is the last one.
                self._rows.pop()
                self._starts.pop()
                pending -= 1
        roster.preempt_worst(pending)
        self.num_preempted += 1
        return True

    # -- prefills ----------------------------------------------------------------------------------------

    def _add_prefills(self, num_decodes: int) -> int:
        """The next chunk of each prompt under way, best rank first. Returns the decode rows that remain."""
        roster, kv = self._roster, self._kv
        chunks: list[tuple[Request, int, int]] = []
        used = 0
        at = 0
        while at < len(roster.prefilling):
            request = roster.prefilling[at]
            start = request.num_computed
            budget = self._config.max_num_batched_tokens - len(self._rows) - used
            stop = min(request.num_tokens, start + budget, start + self._chunk_cap)
            if budget <= 0:
                break
            if stop > request.capacity:
                reach = kv.reach(request)
                while reach <= start and self._preempt_for(request):
                    reach = kv.reach(request)
                stop = min(stop, reach)
                if stop <= start:
                    self._stalled = True
                    at += 1
                    continue
                grown = kv.grow(request, stop)
                assert grown is not None, "reach said so"
                roster.updates += [(request.batch_index, group, first, ids) for group, first, ids in grown]
            chunks.append((request, start, stop - start))
            used += stop - start
            request.num_computed = stop
            at += 1
        num_decodes = len(self._rows)
        for request, start, count in chunks:
            self._add_chunk(request, start, count)
        if chunks:
            # Only now: the loop above relies on decode rows and ``decoding`` being the same list.
            for request, _, _ in chunks:
                if request.num_computed == request.num_tokens:
                    roster.prefilling.remove(request)
                    roster.start_decoding(request, self.index)
        return num_decodes

    def _add_chunk(self, request: Request, start: int, count: int) -> None:
        self._rows.append(request)
        self._starts.append(start)
        self._counts.append(count)
        self._samples.append(start + count == request.num_tokens)

    # -- admissions --------------------------------------------------------------------------------------

    def _add_admissions(self, num_decodes: int) -> None:
        """Admit waiting requests, best rank first, while seats, budget and blocks last.

        Only those that wait for their own token in flight, for a sibling that is computing their prompt, or at
        the gate (for KV from elsewhere) are passed over. The first that finds too few blocks stops the line:
        nobody of a worse rank may take the blocks that it waits for.
        """
        roster, config = self._roster, self._config
        budget = config.max_num_batched_tokens - num_decodes - sum(self._counts)
        at = 0
        while at < len(roster.waiting) and roster.free_seats and budget > 0:
            request = roster.waiting[at]
            if request.num_pending:
                at += 1
                continue
            alone = not roster.decoding and not roster.prefilling
            if self._blocked is not None and not alone:
                blocked, free = self._blocked
                if blocked is request and self._kv.num_free_blocks <= free:
                    self._blocked = (request, self._kv.num_free_blocks)
                    return
            if self._gate is not None and not self._gate(request):
                at += 1
                continue
            hit = self._find_hit(request)
            if hit is None:
                at += 1
                continue
            start, count = self._begin(request, hit, budget, alone)
            if not count:
                if config.enable_chunked_prefill or budget >= request.num_tokens:
                    self._blocked = (request, self._kv.num_free_blocks)
                return
            self._blocked = None
            del roster.waiting[at]
            roster.seat(request)
            self._admitted.append(request)
            self._add_chunk(request, start, count)
            budget -= count
            request.num_computed = start + count
            if request.num_computed == request.num_tokens:
                roster.start_decoding(request, self.index)
            else:
                self._insert_prefilling(request)

    def _insert_prefilling(self, request: Request) -> None:
        queue = self._roster.prefilling
        at = len(queue)
        while at and queue[at - 1].rank > request.rank:
            at -= 1
        queue.insert(at, request)

    def _find_hit(self, request: Request) -> PrefixHit | None:
        """What need not be computed; None: a sibling is computing the prompt, wait for it."""
        if request.sampling.wants_whole_prompt:
            return NO_HIT  # something of every prompt token is asked for
        root = request.parent or request
        if root.children:
            prompt = len(request.prompt_token_ids)
            busy = False
            for member in (root, *root.children):
                if member is request or member.status is not RequestStatus.RUNNING:
                    continue
                if 0 <= member.prefilled_at < self.index:
                    hit = None if request.output_token_ids else self._kv.share(member, prompt - 1)
                    if hit is not None:
                        return hit
                elif not request.output_token_ids:
                    busy = True
            if busy:
                return None
        return self._kv.match(request)

    def _begin(self, request: Request, hit: PrefixHit, budget: int, alone: bool) -> tuple[int, int]:
        """Allocate for the first chunk. Returns its start and its tokens, 0 if it must wait."""
        kv, whole = self._kv, not self._config.enable_chunked_prefill
        total = request.num_tokens
        count = min(total - hit.num_tokens, budget, self._chunk_cap)
        if whole and count < total - hit.num_tokens:
            return 0, 0
        reserve = None if alone else self._reserve(request, hit.num_tokens + count)
        copies = kv.begin(request, hit, hit.num_tokens + count, reserve)
        while copies is None and alone:
            # Alone it can always start: `check_request` has seen to that. Give up, in this order, a part of
            # the chunk, the copy of a last block, and the cached blocks that pin what a window has passed.
            if count > 1 and not whole:
                count = (count + 1) // 2
            elif hit.num_tokens:
                hit = kv.shorten(hit) if any(hit.num_tokens % g.block_size for g in kv.groups) else NO_HIT
                count = min(total - hit.num_tokens, budget, self._chunk_cap)
            else:
                return 0, 0
            copies = kv.begin(request, hit, hit.num_tokens + count)
        if copies is None:
            return 0, 0
        self._copies += copies
        if not request.num_preemptions:
            request.num_cached_tokens = hit.num_tokens
        if kv.enable_prefix_caching:
            kv.count_prefix(total, hit.num_tokens)
        return hit.num_tokens, count

    def _reserve(self, request: Request, first_stop: int) -> list[int]:
        """Blocks per group to leave free: the watermark, and what prompts already under way still need.

        Without it, prompts admitted chunk by chunk would overfill the pool together and preempt each other.
        """
        reserve: list[int] = []
        for group, watermark in zip(self._kv.groups, self._watermarks, strict=True):
            left = group.peak_blocks(request.num_tokens, self._chunk_cap) - group.blocks_for(first_stop)
            need = watermark + max(0, left)
            for other in self._roster.prefilling:
                held = len(other.block_ids[group.index]) - other.num_dropped[group.index]
                need += max(0, group.peak_blocks(other.num_tokens, self._chunk_cap) - held)
            reserve.append(need)
        return reserve
