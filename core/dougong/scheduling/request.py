"""One request as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import Enum

from dougong.kv import KVSequence
from dougong.types import FinishReason, SamplingParams

__all__ = ["Request", "RequestStatus"]


class RequestStatus(str, Enum):
    """WAITING → RUNNING → FINISHED, with detours RUNNING → PREEMPTED → RUNNING."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Request(KVSequence):
    """Tokens, options and progress of one request. Owned by the scheduler once added: others only read it.

    ``n > 1`` is n requests: make one, and the rest with `sibling`. They share the prompt's blocks.
    """

    __slots__ = (
        "arrival",
        "batch_index",
        "children",
        "commit_horizon",
        "eos_token_ids",
        "finish_reason",
        "grammar",
        "last_start",
        "num_cached_tokens",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "parent",
        "prefilled_at",
        "priority",
        "rank",
        "request_id",
        "requires_commit",
        "sampling",
        "schedule_horizon",
        "status",
        "stop_ids",
        "stop_reason",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        priority: int = 0,
        arrival: float = 0.0,
        adapter: str | None = None,
        cache_salt: str | None = None,
        multimodal: Iterable[tuple[int, int, bytes]] = (),
        parent: Request | None = None,
        requires_commit: bool = False,
        grammar: object = None,
    ) -> None:
        super().__init__(prompt_token_ids, adapter=adapter, cache_salt=cache_salt, multimodal=multimodal)
        self.request_id = request_id
        self.sampling = SamplingParams() if sampling is None else sampling
        self.eos_token_ids = frozenset(eos_token_ids)
        self.priority = priority
        """Lower goes first, under the policy ``priority``."""
        self.arrival = arrival
        """The engine's clock, for its own figures. The order of `Scheduler.add` decides who came first."""
        self.parent = parent
        """The first of n siblings; None for itself and for a request alone."""
        self.children: list[Request] = []
        """Siblings whose ``parent`` this is, those already added."""
        self.requires_commit = requires_commit
        """True: never scheduled again before its last token is committed (whoever needs it on the host for that)."""
        self.grammar = grammar
        """What compiled from ``sampling.structured``; read by the execution alone."""
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        """The stop token id or string that ended it; None for the model's own end token."""
        self.num_computed = 0
        """Positions computed or scheduled to be."""
        self.num_cached_tokens = 0
        """Positions that the first admission found computed: in the prefix cache, or by a sibling."""
        self.num_preemptions = 0
        self.batch_index = -1
        """Its row of the persistent batch while running, else -1."""
        # What follows is the scheduler's own.
        self.num_pending = 0  # sampled tokens not committed yet, counted only while preempted
        self.rank: tuple[int, int] = (0, 0)
        # None is in it so that commit's one look-up also catches a row that got no token.
        self.stop_ids: frozenset[int | None] = frozenset((None, *self.sampling.stop_token_ids)) | (
            frozenset() if self.sampling.ignore_eos else self.eos_token_ids
        )
        self.prefilled_at = -1  # index of the plan that computed its last known token, once it decodes
        self.last_start = 0  # position whose computation samples the last token allowed
        # The fast paths of a step handle positions below these without looking further.
        self.schedule_horizon = 0
        self.commit_horizon = 0

    def sibling(self, request_id: str, sampling: SamplingParams | None = None) -> Request:
        """Another sample of the same prompt (n > 1). Add it after this one.

        Without ``sampling`` it takes this one's, less ``prompt_logprobs``: those are the first one's to give,
        and asking for them again would mean computing the prompt again.
        """
        return Request(
            request_id,
            self.prompt_token_ids,
            replace(self.sampling, prompt_logprobs=None) if sampling is None else sampling,
            eos_token_ids=self.eos_token_ids,
            priority=self.priority,
            arrival=self.arrival,
            adapter=self.adapter,
            cache_salt=self.cache_salt,
            multimodal=self.multimodal,
            parent=self.parent or self,
            requires_commit=self.requires_commit,
            grammar=self.grammar,
        )

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, prompt={len(self.prompt_token_ids)}, "
            f"output={len(self.output_token_ids)}, computed={self.num_computed})"
        )
