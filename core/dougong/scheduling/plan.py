"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from dougong.kv import BlockCopy
from dougong.scheduling.request import Request
from dougong.types import FinishReason

__all__ = ["BlockUpdate", "StepPlan", "TokenEvent"]

#: (request, token id or None, why the request ended or None). A plain tuple, because one is made for every
#: running request in every step: a named one would cost as much as all the rest of the step.
TokenEvent = tuple[Request, int | None, FinishReason | None]

#: (batch index, group, first block-table entry, ids to write from there on).
BlockUpdate = tuple[int, int, int, list[int]]


@dataclass(slots=True, eq=False)
class StepPlan:
    """Rows of one step. The lists are the plan's own: the scheduler does not touch them after `schedule`.

    Apply the changes in this order: ``released``, ``admitted``, ``new_blocks`` in list order, ``copies``,
    then the forward. Row i computes positions ``starts[i] … starts[i] + num_tokens[i] - 1`` of its request's
    prompt and output, and gives a token if ``samples[i]``.

    The first ``num_decode_rows`` rows are decodes: one token, which samples. The input token of a decode row
    may not be committed yet; it is then the one that the plan before sampled for the same request, still on
    the device. All input tokens of the other rows are known to the host.
    """

    index: int
    """Counts plans from 0."""
    requests: list[Request]
    starts: list[int]
    num_tokens: list[int]
    samples: list[bool]
    num_decode_rows: int
    total_tokens: int
    rows_changed: bool
    """False: exactly the rows of the plan before, all decodes, each one position further."""
    admitted: list[Request] = field(default_factory=list)
    """Got a ``batch_index`` in this step; their whole block table is in ``new_blocks`` as well."""
    released: list[int] = field(default_factory=list)
    """Batch indices given back since the plan before; one may be in ``admitted`` again."""
    new_blocks: list[BlockUpdate] = field(default_factory=list)
    """Block-table changes only, in the order to apply them; 0 where a block fell behind a window."""
    copies: list[BlockCopy] = field(default_factory=list)
    """Block copies to run before the forward (copy-on-write). No block is in it both as source and target."""
    num_preempted: int = 0
    """Requests that lost their blocks and their seat in this step."""
    stale: set[Request] = field(default_factory=set)
    """The scheduler's: requests that finished or were preempted while this plan was in flight."""

    @property
    def num_rows(self) -> int:
        return len(self.requests)
